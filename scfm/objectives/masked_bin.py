"""Masked bins: predict the bins of hidden genes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

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
class MaskedBin:
    """Cross-entropy over bins, mean over hidden genes (scBERT's pretraining).

    Among the logits is the mask's, as in scBERT, though it is never right. Only expressed genes are hidden
    (`data.mask_candidates: expressed`), so the accuracy takes the best of bins 1 to n_bins - 1, as scBERT does.
    """

    n_bins: int
    weight: float = 1.0
    start_step: int = 0

    name: ClassVar[str] = "masked_bin"
    scope: ClassVar[str] = "pack"
    needs_second_pass: ClassVar[bool] = False

    @classmethod
    def from_config(cls, config: ObjectiveConfig, inputs: ObjectiveInputs) -> Self:
        """Build it from its section of the recipe."""
        return cls(inputs.n_bins, config.weight, config.start_step)

    def heads(self) -> list[HeadSpec]:
        """Return the heads that it reads."""
        return [HeadSpec(self.name, "bins", self.n_bins + 1)]

    def loss(self, batch: PackedBatch, output: ModelOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum over the pack's hidden genes divided by the global batch's count of them, and metrics alike.

        Reads `output.predictions["masked_bin"]`, (U, n_bins + 1) logits. Raises ScfmError if the batch hides nothing.
        """
        if batch.targets is None:
            raise ScfmError("objective masked_bin: the batch has no targets; set data.mask_ratios to hide genes")
        logits = output.predictions[self.name]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        target = batch.targets[batch.predicted].long()
        count = max(batch.total_unknown, 1)
        right = logits.detach()[:, 1 : self.n_bins].argmax(-1) + 1 == target
        return F.cross_entropy(logits, target, reduction="sum") / count, {"masked_bin_accuracy": right.sum() / count}
