"""ECS: draw similar cells together and push dissimilar ones apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch.nn.functional as F
from torch import Tensor

from scfm.model.heads import HeadSpec
from scfm.objectives.inputs import ObjectiveInputs
from scfm.recipe import ObjectiveConfig


@dataclass
class ECS:
    """Elastic cell similarity (scGPT): 1 - (c - threshold)^2 over all pairs of cells, c their cosine similarity.

    As in scGPT, negative similarities count as 0, and so does a cell's similarity with itself, which stays in the mean.
    """

    threshold: float = 0.8
    weight: float = 1.0
    start_step: int = 0

    name: ClassVar[str] = "ecs"
    scope: ClassVar[str] = "global"
    views: ClassVar[int] = 1
    needs_second_pass: ClassVar[bool] = False

    @classmethod
    def from_config(cls, config: ObjectiveConfig, inputs: ObjectiveInputs) -> Self:
        """Build it from its section of the recipe."""
        return cls(config.threshold, config.weight, config.start_step)

    def heads(self) -> list[HeadSpec]:
        """Return the heads that it reads: none."""
        return []

    def loss(self, cells: Tensor) -> Tensor:
        """Return the loss over the real cells of the whole global batch, (N, D) -> scalar."""
        unit = F.normalize(cells, dim=-1)
        similarity = (unit @ unit.t()).fill_diagonal_(0).relu()  # (N, N)
        return (1 - (similarity - self.threshold).square()).mean()
