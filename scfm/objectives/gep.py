"""GEP: predict the values of unknown genes from their tokens."""

from __future__ import annotations

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
class GEP:
    """Gene expression prediction (scGPT): squared error, or cross-entropy over bins, mean over unknown genes.

    With `nonzero` the negative log-likelihood of a gene being expressed or not is added (scGPT's explicit zero
    probability), and stands among the metrics as `<name>_nonzero`.
    """

    n_bins: int
    criterion: Literal["mse", "cross_entropy"] = "mse"
    weight: float = 1.0
    start_step: int = 0
    nonzero: bool = False

    name: ClassVar[str] = "gep"
    head: ClassVar[Literal["gep", "gepc"]] = "gep"
    scope: ClassVar[str] = "pack"
    needs_second_pass: ClassVar[bool] = False

    @classmethod
    def from_config(cls, config: ObjectiveConfig, inputs: ObjectiveInputs) -> Self:
        """Build it from its section of the recipe."""
        return cls(inputs.n_bins, config.loss, config.weight, config.start_step, config.nonzero)

    def heads(self) -> list[HeadSpec]:
        """Return the heads that it reads."""
        return [HeadSpec(self.head, self.head, 1 if self.criterion == "mse" else self.n_bins, nonzero=self.nonzero)]

    def loss(self, batch: PackedBatch, output: ModelOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum over the pack's unknown genes divided by the global batch's count of them, and metrics alike.

        Reads `output.predictions[name]`: values (U,), or logits (U, n_bins), whose expected bin then gives a squared
        error among the metrics, to compare with. Raises ScfmError if the batch hides nothing.
        """
        if batch.targets is None:
            raise ScfmError(f"objective {self.name}: the batch has no targets; set data.mask_ratios to hide genes")
        prediction = output.predictions[self.name]
        target = batch.targets[batch.predicted]
        count = max(batch.total_unknown, 1)
        if self.criterion == "mse":
            loss = (prediction - target).square().sum() / count
            if not self.nonzero:
                return loss, {}
            logits = output.predictions[f"{self.name}_nonzero"]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            surprise = F.binary_cross_entropy_with_logits(logits, (target > 0).to(logits), reduction="sum") / count
            return loss + surprise, {f"{self.name}_nonzero": surprise.detach()}
        logits = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        loss = F.cross_entropy(logits, target.long(), reduction="sum") / count
        bins = torch.arange(self.n_bins, dtype=logits.dtype, device=logits.device)
        expected = logits.detach().softmax(-1) @ bins
        return loss, {f"{self.name}_mse": (expected - target).square().sum() / count}
