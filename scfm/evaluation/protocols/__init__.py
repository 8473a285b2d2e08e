"""The tasks that can be evaluated: a new one is a file here and a line below."""

from __future__ import annotations

from scfm.errors import ScfmError
from scfm.evaluation.protocol import EvaluationProtocol
from scfm.evaluation.protocols.annotation import Annotation
from scfm.evaluation.protocols.integration import Integration

PROTOCOLS: dict[str, type[EvaluationProtocol]] = {protocol.name: protocol for protocol in (Annotation, Integration)}


def protocol_of(task: str) -> EvaluationProtocol:
    """Return the protocol of a task. Raises ScfmError for one that cannot be evaluated."""
    if task not in PROTOCOLS:
        raise ScfmError(f"no task {task!r} can be evaluated; there is {', '.join(PROTOCOLS)}")
    return PROTOCOLS[task]()
