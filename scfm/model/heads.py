"""What is read from the transformer's output: values of genes from tokens or cells, and classes of cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfm.data.batch import PackedBatch
from scfm.errors import ScfmError
from scfm.model.layers import Linear
from scfm.model.neighbours import NeighbourDecoder

Query = Literal["product", "detached product", "concat", "sum"]
QUERY_WIDTH = 64  # of the hidden layer of the concat and sum queries, as in scGPT


@dataclass
class HeadSpec:
    """A head that an objective or a task asks for.

    Attributes:
        task: its name, under which its weights and its predictions stand.
        kind: `gep` (values of genes), `gepc` (values of genes from the cell embedding), `bins` (scBERT: bins of genes),
            `cls` (classes of cells), `genes` (scBERT: classes of cells, from a number per gene), `neighbours` (classes
            of cells, by the vote of reference cells) or `domain` (classes that the cell embedding should not tell: the
            gradient is reversed below the head).
        n_out: numbers per prediction: 1 for a value, else the bins (of kind bins: and one for the mask) or classes.
        labels: names of the classes, in order of their index.
        nonzero: gep and gepc: also predict whether the gene is expressed (scGPT's explicit zero probability); its
            logits stand under `<task>_nonzero`.
        query: gepc: how gene and cell meet; scGPT's "inner product" (its `detach` keeps the gradient from the gene
            embedding), "concat query" and "sum query".
        query_reads_conditions: gepc: the query is made of the gene and its conditions (scGPT's multi-omic model).
        affine: gep: the value is a * x + b, x the input value (scGPT's perturbation generator).
        activation: affine: name of a torch activation of a and b.
        adaptive_bias: affine: b is multiplied by the mean of the cell's non-zero inputs.
        layers: cls and domain: linear layers, the last included.
        references: neighbours: cells that vote.
        neighbours: neighbours: how many of them vote on a cell, the nearest.
        novelty: by what a cell of a novel type is told, the largest `probability` or the `energy` of its logits.
        threshold: of the novelty score of `scfm.tasks.novel_types`; cells above it are of a novel type.
    """

    task: str
    kind: Literal["gep", "gepc", "bins", "cls", "genes", "neighbours", "domain"]
    n_out: int = 1
    labels: list[str] | None = None
    nonzero: bool = False
    query: Query = "product"
    query_reads_conditions: bool = False
    affine: bool = False
    activation: str | None = None
    adaptive_bias: bool = False
    layers: int = 3
    references: int = 0
    neighbours: int = 0
    novelty: Literal["probability", "energy"] | None = None
    threshold: float | None = None

    @property
    def tells_classes(self) -> bool:
        """Whether it predicts the class of a cell."""
        return self.kind in ("cls", "genes", "neighbours") and self.n_out > 1


class Values(NamedTuple):
    """Predicted values, (U,) or (U, n_out) logits over bins, and logits (U,) of being expressed where asked for."""

    values: Tensor
    nonzero: Tensor | None


class MLP(nn.Module):
    """Two hidden layers with leaky ReLU: (U, in) -> (U,) or (U, n_out)."""

    def __init__(self, width: int, in_width: int, n_out: int = 1) -> None:
        super().__init__()
        self.linear1 = Linear(in_width, width)
        self.linear2 = Linear(width, width)
        self.out = Linear(width, n_out)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.leaky_relu(self.linear2(F.leaky_relu(self.linear1(x))))
        return self.out(hidden).squeeze(-1) if self.out.out_features == 1 else self.out(hidden)


class ValueDecoder(MLP):
    """GEP: an MLP from a gene's token to its value or to logits over bins: (U, in) -> (U,) or (U, n_out).

    A fresh value decoder starts by predicting the middle bin: from zero, the first hundreds of steps would go into
    raising the bias.
    """

    def __init__(self, width: int, in_width: int, n_out: int, n_bins: int, nonzero: bool) -> None:
        super().__init__(width, in_width, n_out)
        self.nonzero = MLP(width, in_width) if nonzero else None
        if n_out == 1:
            nn.init.constant_(self.out.bias, (n_bins - 1) / 2)

    def forward(self, tokens: Tensor) -> Values:  # type: ignore[override]
        return Values(super().forward(tokens), None if self.nonzero is None else self.nonzero(tokens))


class AffineValueDecoder(nn.Module):
    """GEP of perturbed cells: a * x + b, with a and b read from the gene's token: (U, in) -> (U,).

    Takes besides the tokens the unperturbed values x (U,) and the mean non-zero value of each gene's cell (U,).
    """

    def __init__(self, spec: HeadSpec, width: int, in_width: int) -> None:
        super().__init__()
        self.coefficient = ValueDecoder(width, in_width, 1, n_bins=1, nonzero=spec.nonzero)
        self.bias = MLP(width, in_width)
        kind: Any = getattr(torch.nn.modules.activation, spec.activation or "", nn.Identity)
        if spec.activation and kind is nn.Identity:
            raise ScfmError(f"head {spec.task}: torch.nn has no activation {spec.activation!r}")
        self.activation = kind()
        self.adaptive_bias = spec.adaptive_bias

    def forward(self, tokens: Tensor, inputs: Tensor, mean_input: Tensor) -> Values:
        coefficient, bias = self.coefficient(tokens), self.activation(self.bias(tokens))
        bias = bias * mean_input if self.adaptive_bias else bias
        return coefficient._replace(values=self.activation(coefficient.values) * inputs + bias)


class ProductDecoder(nn.Module):
    """GEPC: a gene's value from the cell embedding alone, by the inner product <W q, c> with q = sigmoid(query(gene)).

    Takes the gene embeddings (U, Dq), the cells (N, in) and the cell of each gene (U,); returns (U,). Logits over bins
    (U, n_out) are linear in the elementwise product (W q) * c. The logit of being expressed is <Z q + z, c>.
    """

    def __init__(self, spec: HeadSpec, query_width: int, in_width: int) -> None:
        super().__init__()
        self.detach = spec.query == "detached product"
        self.query = Linear(query_width, query_width)
        self.project = Linear(query_width, in_width, bias=False)
        self.out = Linear(in_width, spec.n_out) if spec.n_out > 1 else None
        self.nonzero = Linear(query_width, in_width) if spec.nonzero else None

    def forward(self, genes: Tensor, cells: Tensor, cell_of_gene: Tensor) -> Values:
        query = torch.sigmoid(self.query(genes.detach() if self.detach else genes))
        if self.out is not None:
            return Values(self.out(self.project(query) * cells.index_select(0, cell_of_gene)), None)

        # <W q, c> = <q, W^T c>: one product per cell instead of one per gene
        def inner(layer: nn.Linear) -> Tensor:
            return (query * F.linear(cells, layer.weight.t()).index_select(0, cell_of_gene)).sum(-1)

        if self.nonzero is None:
            return Values(inner(self.project), None)
        return Values(inner(self.project), inner(self.nonzero) + (cells @ self.nonzero.bias)[cell_of_gene])


class QueryDecoder(nn.Module):
    """GEPC: a gene's value from a small MLP of query and cell, joined (`concat`) or added (`sum`): -> (U,)."""

    def __init__(self, spec: HeadSpec, query_width: int, in_width: int) -> None:
        super().__init__()
        if spec.nonzero or spec.n_out > 1:
            raise ScfmError(f"head {spec.task}: the {spec.query} query predicts values only; choose query `product`")
        self.concat = spec.query == "concat"
        self.query = Linear(query_width, QUERY_WIDTH if self.concat else in_width)
        self.hidden = Linear(in_width + QUERY_WIDTH if self.concat else in_width, QUERY_WIDTH)
        self.activation = nn.PReLU()
        self.out = Linear(QUERY_WIDTH, 1)

    def forward(self, genes: Tensor, cells: Tensor, cell_of_gene: Tensor) -> Values:
        query, cell = torch.sigmoid(self.query(genes)), cells.index_select(0, cell_of_gene)
        met = torch.cat([cell, query], -1) if self.concat else cell + query
        return Values(self.out(self.activation(self.hidden(met))).squeeze(-1), None)


class ClassDecoder(nn.Module):
    """CLS: an MLP from the cell embedding to logits over classes: (N, D) -> (N, n_out)."""

    activation: type[nn.Module] = nn.ReLU

    def __init__(self, width: int, n_out: int, layers: int = 3) -> None:
        super().__init__()
        hidden = [
            nn.Sequential(Linear(width, width), self.activation(), nn.LayerNorm(width)) for _ in range(layers - 1)
        ]
        self.hidden = nn.Sequential(*hidden)
        self.out = Linear(width, n_out)

    def forward(self, cells: Tensor) -> Tensor:
        return self.out(self.hidden(cells))


class BinDecoder(nn.Module):
    """Masked bins (scBERT): a linear layer from a gene's token to logits: (U, D) -> (U, n_bins + 1).

    The last logit is the mask's, which is no target: scBERT's head has it.
    """

    def __init__(self, width: int, n_out: int) -> None:
        super().__init__()
        self.out = Linear(width, n_out)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(tokens)


class GeneClassDecoder(nn.Module):
    """CLS (scBERT): one number per gene, then an MLP over all genes to logits over classes: (T, D) -> (N, n_out).

    The first layer has a weight per gene of the vocabulary, by vocabulary index, and one for `<cls>`, which comes last.
    A gene that a cell lacks is 0 there.
    """

    def __init__(self, width: int, n_out: int, n_positions: int) -> None:
        super().__init__()
        self.token = Linear(width, 1)
        self.linear1 = Linear(n_positions, 512)
        self.linear2 = Linear(512, 128)
        self.out = Linear(128, n_out)

    def forward(self, tokens: Tensor, batch: PackedBatch) -> Tensor:
        n_positions = self.linear1.in_features
        numbers = F.relu(self.token(tokens))[:, 0]  # (T,)
        position = batch.genes.long().clamp(max=n_positions - 1)  # special tokens stand behind all genes
        place = batch.cell_of_token * n_positions + position
        cells = numbers.new_zeros(batch.n_cells * n_positions).index_copy(0, place, numbers)
        hidden = F.relu(self.linear1(cells.view(batch.n_cells, n_positions)))
        return self.out(F.relu(self.linear2(hidden)))


class DomainDecoder(ClassDecoder):
    """DAR: as CLS, but what lies below learns the opposite (gradient reversal: Ganin and Lempitsky, ICML 2015)."""

    activation = nn.LeakyReLU

    def forward(self, cells: Tensor) -> Tensor:
        return super().forward(_ReverseGradient.apply(cells))


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0]


def build_head(spec: HeadSpec, width: int, in_width: int, n_bins: int, n_positions: int = 0) -> nn.Module:
    """Build a head.

    Args:
        spec: what it predicts.
        width: D.
        in_width: width of tokens and cells with their conditions joined.
        n_bins: value bins.
        n_positions: of kind genes: genes of the vocabulary, and one for `<cls>`.
    """
    if spec.kind == "gep":
        if spec.affine:
            return AffineValueDecoder(spec, width, in_width)
        return ValueDecoder(width, in_width, spec.n_out, n_bins, spec.nonzero)
    if spec.kind == "gepc":
        kind = ProductDecoder if spec.query.endswith("product") else QueryDecoder
        return kind(spec, in_width if spec.query_reads_conditions else width, in_width)
    if spec.kind == "bins":
        return BinDecoder(width, spec.n_out)
    if spec.kind == "genes":
        return GeneClassDecoder(width, spec.n_out, n_positions)
    if spec.kind == "neighbours":
        return NeighbourDecoder(width, spec.n_out, spec.references, spec.neighbours)
    return (ClassDecoder if spec.kind == "cls" else DomainDecoder)(width, spec.n_out, spec.layers)
