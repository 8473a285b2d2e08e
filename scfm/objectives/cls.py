"""CLS: predict the class of a cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from scfm.data.batch import PackedBatch
from scfm.errors import ScfmError
from scfm.model.heads import HeadSpec
from scfm.model.output import ModelOutput
from scfm.objectives.inputs import ObjectiveInputs
from scfm.recipe import ObjectiveConfig


@dataclass
class CLS:
    """Cross-entropy of the class of each cell, from its cell embedding or from a number per gene (scBERT).

    Reads `batch.cell_conditions["label"]`; cells without a label (-1) and pseudo-cells do not count. With class weights
    the weighted sum is still divided by the number of cells, so that a cell's gradient does not depend on its batch
    mates; weights that average 1 over the cells keep the scale of the unweighted loss.
    """

    labels: Sequence[str]
    class_weights: Tensor | None = None
    weight: float = 1.0
    start_step: int = 0
    reads: Literal["cell", "genes"] = "cell"

    name: ClassVar[str] = "cls"
    head: ClassVar[str] = "annotation"
    scope: ClassVar[str] = "pack"
    needs_second_pass: ClassVar[bool] = False

    @classmethod
    def from_config(cls, config: ObjectiveConfig, inputs: ObjectiveInputs) -> Self:
        """Build it from its section of the recipe. Raises ScfmError with fewer than two labels."""
        if len(inputs.labels) < 2:
            raise ScfmError(f"objectives: cls needs a task with at least 2 labels, there are {len(inputs.labels)}")
        return cls(inputs.labels, inputs.class_weights, config.weight, config.start_step, config.head)

    def heads(self) -> list[HeadSpec]:
        """Return the heads that it reads."""
        return [HeadSpec(self.head, "cls" if self.reads == "cell" else "genes", len(self.labels), list(self.labels))]

    def loss(self, batch: PackedBatch, output: ModelOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum over the pack's cells divided by the global batch's count of them, and the accuracy alike.

        Raises ScfmError if the batch has no labels.
        """
        if "label" not in batch.cell_conditions:
            raise ScfmError("objective cls: the batch has no cell condition `label`; name the label column of the task")
        logits = output.predictions[self.head]
        if self.class_weights is not None:  # moved once: a copy in every step would make the host wait for the GPU
            self.class_weights = self.class_weights.to(logits.device)
        loss, accuracy = class_loss(logits, "label", batch, self.class_weights)
        return loss, {"cls_accuracy": accuracy}


def class_loss(
    logits: Tensor, condition: str, batch: PackedBatch, class_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of a cell condition and the accuracy, as shares of the global batch: (N, C) logits."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    truth = torch.where(batch.real_cells, batch.cell_conditions[condition], -1)
    weights = None if class_weights is None else class_weights.to(logits)
    count = max(batch.total_cells, 1)
    loss = F.cross_entropy(logits, truth, weights, ignore_index=-1, reduction="sum") / count
    return loss, (logits.detach().argmax(-1) == truth).sum() / count
