"""DAR: make the cell embedding forget the domain (batch, donor) of a cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from scfm.data.batch import PackedBatch
from scfm.errors import ScfmError
from scfm.model.heads import HeadSpec
from scfm.model.output import ModelOutput
from scfm.objectives.cls import class_loss
from scfm.objectives.inputs import ObjectiveInputs
from scfm.recipe import ObjectiveConfig


@dataclass
class DAR:
    """Domain adaptation by reverse back-propagation (scGPT; DAB in its code).

    A head learns to tell a cell's domain from its embedding, and hands the reversed gradient down (Ganin and Lempitsky,
    ICML 2015), so that the embedding learns to hide it. Cells without a domain (-1) do not count.
    """

    condition: str
    domains: Sequence[str]
    weight: float = 1.0
    start_step: int = 0

    name: ClassVar[str] = "dar"
    scope: ClassVar[str] = "pack"
    needs_second_pass: ClassVar[bool] = False

    @classmethod
    def from_config(cls, config: ObjectiveConfig, inputs: ObjectiveInputs) -> Self:
        """Build it from its section of the recipe. Raises ScfmError without a condition of at least two domains."""
        if config.condition is None:
            raise ScfmError("objectives: dar needs `condition`, the obs column that the cell embedding should not tell")
        domains = inputs.categories.get(config.condition, ())
        if len(domains) < 2:
            found = f"the obs column {config.condition!r} has {len(domains)}"
            raise ScfmError(f"objectives: dar needs a condition of at least 2 values; {found}")
        return cls(config.condition, domains, config.weight, config.start_step)

    def heads(self) -> list[HeadSpec]:
        """Return the heads that it reads."""
        return [HeadSpec(self.name, "domain", len(self.domains), list(self.domains))]

    def loss(self, batch: PackedBatch, output: ModelOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy of the domain, and how often the head tells it, as shares of the global batch."""
        loss, accuracy = class_loss(output.predictions[self.name], self.condition, batch)
        return loss, {"dar_accuracy": accuracy}
