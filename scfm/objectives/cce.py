"""CCE: two looks at a cell under different dropout should agree more than looks at different cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from scfm.model.heads import HeadSpec
from scfm.objectives.inputs import ObjectiveInputs
from scfm.recipe import ObjectiveConfig


@dataclass
class CCE:
    """Contrastive cell embedding (scGPT, after SimCSE: Gao et al., EMNLP 2021).

    Cross-entropy of finding each cell's second embedding among all, by cosine similarity over a temperature.
    """

    temperature: float = 0.5
    weight: float = 1.0
    start_step: int = 0

    name: ClassVar[str] = "cce"
    scope: ClassVar[str] = "global"
    views: ClassVar[int] = 2
    needs_second_pass: ClassVar[bool] = False

    @classmethod
    def from_config(cls, config: ObjectiveConfig, inputs: ObjectiveInputs) -> Self:
        """Build it from its section of the recipe."""
        return cls(config.temperature, config.weight, config.start_step)

    def heads(self) -> list[HeadSpec]:
        """Return the heads that it reads: none."""
        return []

    def loss(self, cells: Tensor, again: Tensor) -> Tensor:
        """Return the loss over the real cells of the whole global batch, two embeddings each: (N, D) x 2 -> scalar."""
        similarity = F.normalize(cells, dim=-1) @ F.normalize(again, dim=-1).t() / self.temperature  # (N, N)
        return F.cross_entropy(similarity, torch.arange(len(cells), device=cells.device))
