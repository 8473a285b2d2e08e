"""Objectives: the terms of the loss. Each is a small class in a file of its own; a recipe composes them by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from scfm.errors import ScfmError
from scfm.model.heads import HeadSpec
from scfm.objectives.cce import CCE
from scfm.objectives.cell_prompt import CellPrompt
from scfm.objectives.cls import CLS
from scfm.objectives.dar import DAR
from scfm.objectives.ecs import ECS
from scfm.objectives.gep import GEP
from scfm.objectives.gepc import GEPC
from scfm.objectives.inputs import ObjectiveInputs
from scfm.objectives.masked_bin import MaskedBin
from scfm.recipe import ObjectiveConfig


class Objective(Protocol):
    """One term of the loss.

    Attributes:
        name: the name that recipes use; also the name of its prediction and its metrics.
        weight: its factor in the sum.
        start_step: first optimizer step in which it counts.
        scope: `pack`: `loss(batch, output)` returns this pack's share of the loss, already divided by the count of the
            global batch, and metrics of the same kind, so that both add up over packs and ranks; `global`:
            `loss(cells, ...)` takes all cells of the global batch, as often as `views` says, each time embedded under
            dropout of its own, and returns the loss.
        views: embeddings of each cell that a `global` loss takes.
        needs_second_pass: whether `predictions[name]` comes from a second pass prompted with the cell embedding.
    """

    name: str
    weight: float
    start_step: int
    scope: str
    views: int
    needs_second_pass: bool

    def heads(self) -> list[HeadSpec]: ...

    def loss(self, *args: Any) -> Any: ...


OBJECTIVES: dict[str, Any] = {
    objective.name: objective for objective in (GEP, GEPC, CellPrompt, ECS, CLS, DAR, CCE, MaskedBin)
}


def build_objectives(
    configs: Sequence[ObjectiveConfig],
    n_bins: int,
    labels: Sequence[str] = (),
    class_weights: Tensor | None = None,
    categories: Mapping[str, Sequence[str]] | None = None,
) -> list[Objective]:
    """Build the objectives of a recipe.

    Args:
        configs: the recipe's `objectives`.
        n_bins: value bins, for objectives that predict values.
        labels: names of the task's classes, in order of their index, for cls.
        class_weights: (len(labels),) weights, for cls.
        categories: cell condition -> names behind its indices, for dar.

    Raises:
        ScfmError: a name is not registered, cls or dar has fewer than two classes, or two objectives disagree on a
            shared head.
    """
    objectives: list[Objective] = []
    heads: dict[str, HeadSpec] = {}
    inputs = ObjectiveInputs(n_bins, labels, class_weights, categories or {})
    for config in configs:
        if config.name not in OBJECTIVES:
            raise ScfmError(f"objectives: there is no {config.name!r}; choose from {', '.join(OBJECTIVES)}")
        objective = OBJECTIVES[config.name].from_config(config, inputs)
        for head in objective.heads():
            if heads.setdefault(head.task, head) != head:
                raise ScfmError(
                    f"objectives: {config.name} shares the head {head.task}, so it needs the same `loss` and `nonzero`"
                )
        objectives.append(objective)
    return objectives
