"""What a model returns for a pack."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scfm.model.heads import Values


@dataclass
class ModelOutput:
    """What a model returns for a pack.

    Attributes:
        tokens: (T, D) the transformer's output.
        cell: (N, D) cell embeddings.
        predictions: by head; `gep` and `gepc` heads predict at `batch.predicted` only, (U,) values or (U, n_bins)
            logits, and where asked for (U,) logits of being expressed under `<head>_nonzero`; `bins` heads predict
            (U, n_bins + 1) logits there; `cls`, `genes` and `domain` heads predict (N, n_classes) logits.
    """

    tokens: Tensor
    cell: Tensor
    predictions: dict[str, Tensor]

    def add_values(self, task: str, values: Values) -> None:
        """Put what a value decoder predicts among the predictions."""
        self.predictions[task] = values.values
        if values.nonzero is not None:
            self.predictions[f"{task}_nonzero"] = values.nonzero
