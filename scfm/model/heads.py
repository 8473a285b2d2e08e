"""What is read from the transformer's output: values of genes from tokens or cells, and classes of cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfm.model.layers import Linear


@dataclass
class HeadSpec:
    """A head that an objective or a task asks for.

    Attributes:
        task: its name, under which its weights and its predictions stand.
        kind: `gep` (values of genes), `gepc` (values of genes from the cell embedding) or `cls` (classes of cells).
        n_out: numbers per prediction: 1 for a value, else the bins or classes.
        labels: names of the classes, in order of their index.
    """

    task: str
    kind: Literal["gep", "gepc", "cls"]
    n_out: int = 1
    labels: list[str] | None = None


class ValueDecoder(nn.Module):
    """GEP: an MLP from a gene's token to its value or to logits over bins: (U, in) -> (U,) or (U, n_out).

    A fresh value decoder starts by predicting the middle bin: from zero, the first hundreds of steps would go into
    raising the bias.
    """

    def __init__(self, width: int, in_width: int, n_out: int, n_bins: int) -> None:
        super().__init__()
        self.linear1 = Linear(in_width, width)
        self.linear2 = Linear(width, width)
        self.out = Linear(width, n_out)
        if n_out == 1:
            nn.init.constant_(self.out.bias, (n_bins - 1) / 2)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = F.leaky_relu(self.linear2(F.leaky_relu(self.linear1(tokens))))
        return self.out(hidden).squeeze(-1) if self.out.out_features == 1 else self.out(hidden)


class CellValueDecoder(nn.Module):
    """GEPC: a gene's value from the cell embedding alone, by the inner product <W q, c> with q = sigmoid(query(gene)).

    Takes the gene embeddings (U, D), the cells (N, in) and the cell of each gene (U,); returns (U,). Logits over bins
    (U, n_out) are linear in the elementwise product (W q) * c.
    """

    def __init__(self, width: int, in_width: int, n_out: int) -> None:
        super().__init__()
        self.query = Linear(width, width)
        self.project = Linear(width, in_width, bias=False)
        self.out = Linear(in_width, n_out) if n_out > 1 else None

    def forward(self, genes: Tensor, cells: Tensor, cell_of_gene: Tensor) -> Tensor:
        query = torch.sigmoid(self.query(genes))
        if self.out is None:
            # <W q, c> = <q, W^T c>: one product per cell instead of one per gene
            cells = F.linear(cells, self.project.weight.t())
            return (query * cells.index_select(0, cell_of_gene)).sum(-1)
        return self.out(self.project(query) * cells.index_select(0, cell_of_gene))


class ClassDecoder(nn.Module):
    """CLS: an MLP from the cell embedding to logits over classes: (N, D) -> (N, n_out)."""

    def __init__(self, width: int, n_out: int, layers: int = 3) -> None:
        super().__init__()
        hidden = [nn.Sequential(Linear(width, width), nn.ReLU(), nn.LayerNorm(width)) for _ in range(layers - 1)]
        self.hidden = nn.Sequential(*hidden)
        self.out = Linear(width, n_out)

    def forward(self, cells: Tensor) -> Tensor:
        return self.out(self.hidden(cells))


def build_head(spec: HeadSpec, width: int, in_width: int, n_bins: int) -> nn.Module:
    """Build a head; `in_width` is the width of tokens and cells with their conditions joined."""
    if spec.kind == "gep":
        return ValueDecoder(width, in_width, spec.n_out, n_bins)
    return CellValueDecoder(width, in_width, spec.n_out) if spec.kind == "gepc" else ClassDecoder(width, spec.n_out)
