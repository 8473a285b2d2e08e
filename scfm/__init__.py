"""scfm: train, fine-tune, score and export single-cell foundation models.

import scfm
model = scfm.load("runs/quickstart/model")
adata = model.embed(adata)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scfm.errors import ScfmError
from scfm.version import __version__

if TYPE_CHECKING:
    from scfm.checking import check
    from scfm.mapping import ReferenceIndex
    from scfm.pretrained import PretrainedModel, load

__all__ = ["PretrainedModel", "ReferenceIndex", "ScfmError", "__version__", "check", "load"]


def __getattr__(name: str) -> Any:
    """Import torch only when a model is asked for."""
    if name in ("load", "PretrainedModel"):
        from scfm import pretrained

        return getattr(pretrained, name)
    if name == "check":
        from scfm.checking import check

        return check
    if name == "ReferenceIndex":
        from scfm.mapping import ReferenceIndex

        return ReferenceIndex
    raise AttributeError(f"module 'scfm' has no attribute {name!r}")
