"""The tasks that can be evaluated: a new one is a file here and a line below."""

from __future__ import annotations

from scfm.errors import ScfmError
from scfm.evaluation.protocol import EvaluationProtocol
from scfm.evaluation.protocols.annotation import Annotation
from scfm.evaluation.protocols.integration import Integration
from scfm.evaluation.protocols.mapping import Mapping, MappingOfNovelTypes
from scfm.evaluation.protocols.novel_types import AnnotationOfNovelTypes

TASKS: tuple[type[EvaluationProtocol], ...] = (Annotation, Integration, Mapping)
PROTOCOLS: dict[str, type[EvaluationProtocol]] = {protocol.name: protocol for protocol in TASKS}
WITH_NOVEL_TYPES: dict[str, type[EvaluationProtocol]] = {
    Annotation.name: AnnotationOfNovelTypes,
    Mapping.name: MappingOfNovelTypes,
}


def protocol_of(task: str, novel_types: bool = False) -> EvaluationProtocol:
    """Return the protocol of a task, or the one by which it is asked with types that were withheld from training.

    Raises ScfmError for a task that cannot be evaluated, or not with such types.
    """
    if task not in PROTOCOLS:
        raise ScfmError(f"no task {task!r} can be evaluated; there is {', '.join(PROTOCOLS)}")
    if not novel_types:
        return PROTOCOLS[task]()
    if task not in WITH_NOVEL_TYPES:
        raise ScfmError(f"--novel: {task} predicts no types; it is for {' and '.join(WITH_NOVEL_TYPES)}")
    return WITH_NOVEL_TYPES[task]()
