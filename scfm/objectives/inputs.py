"""What objectives need to know of the data besides their section of the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class ObjectiveInputs:
    """Facts about the data of a run.

    Attributes:
        n_bins: value bins, for objectives that predict values.
        labels: names of the task's classes, in order of their index, for cls.
        class_weights: (len(labels),) weights, for cls.
        categories: cell condition -> names behind its indices, for dar.
    """

    n_bins: int
    labels: Sequence[str] = ()
    class_weights: Tensor | None = None
    categories: Mapping[str, Sequence[str]] = field(default_factory=dict)
