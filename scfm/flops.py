"""Model FLOPs, counted so that nobody can call them inflated.

Counted are matrix products of weights and the query-key pairs that the mask requires, on tokens of real cells. Not
counted: embedding tables (look-ups), padding and pseudo-cells, recomputation inside kernels, element-wise work. A
product of (m, k) and (k, n) is 2 m k n FLOPs; a backward takes twice its forward.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from scfm.data.batch import PackedBatch
from scfm.model.heads import ClassDecoder, GeneClassDecoder, ProductDecoder
from scfm.model.performer import FeatureMixer

RANDOM = ("exp", "relu", "gelu")  # kernels of random features


@dataclass(frozen=True)
class Work:
    """What a model is given to compute, real cells only; works add up.

    Attributes:
        tokens: tokens, `<cls>` included.
        cells: cells.
        unknown: unknown genes.
        pairs: query-key pairs that the mask allows.
    """

    tokens: int = 0
    cells: int = 0
    unknown: int = 0
    pairs: int = 0

    @classmethod
    def of(cls, batch: PackedBatch, attention: Literal["generative", "full"]) -> Work:
        """Return the work of a pack."""
        sizes = batch.sizes
        pairs = sizes.generative_pairs if attention == "generative" else sizes.full_pairs
        return cls(sizes.tokens, sizes.cells, sizes.unknown, pairs)

    @classmethod
    def of_cell(cls, tokens: int, known: int, attention: Literal["generative", "full"]) -> Work:
        """Count the work of one cell, its known tokens with `<cls>`."""
        pairs = tokens * known + tokens - known if attention == "generative" else tokens**2
        return cls(tokens, 1, tokens - known, pairs)

    def __add__(self, other: Work) -> Work:
        return Work(
            self.tokens + other.tokens,
            self.cells + other.cells,
            self.unknown + other.unknown,
            self.pairs + other.pairs,
        )


def forward_flops(network: nn.Module, work: Work, heads: Iterable[str] | None = None) -> float:
    """Return the FLOPs of one forward pass.

    Args:
        network: a model with a `backbone` that has `blocks`, and with `heads` and `specs` by task, e.g. ScGPT.
        work: what it is given.
        heads: tasks whose heads count; all unless given.
    """
    model: Any = network
    tasks = [task for task in model.specs if heads is None or task in heads]
    tied = sum(model.specs[task].n_out for task in tasks if task not in model.heads)  # bins, by the value embedding
    read = sum(head_flops(model.heads[task], work) for task in tasks if task in model.heads)
    return backbone_flops(model.backbone, work) + read + 2.0 * work.unknown * tied * model.backbone.config.width


def backbone_flops(backbone: nn.Module, work: Work) -> float:
    """Return the FLOPs of everything but the heads: the blocks' linear layers on every token, and what mixes tokens.

    The value encoder is left out: bins are few, and each is encoded once per pack. The output projection counts on
    every token, also where `unknown_output_projection: false` replaces its result: 6 N per token, as in the literature.
    """
    model: Any = backbone
    return sum(mixing_flops(block, work) for block in model.blocks) + work.tokens * linear_flops(model.blocks)


def mixing_flops(block: Any, work: Work) -> float:
    """Return the FLOPs of the genes of a cell reading each other in one block, its linear layers not counted.

    Through m features per head of width d: keys are summed up with values (m x d), and queries read the sums (m x d);
    random features take a product of queries and keys with m directions besides. Norms of the weights are left out.
    """
    width = block.out_proj.in_features
    mixer = getattr(block, "mixer", None)
    if not isinstance(mixer, FeatureMixer):
        return 4.0 * width * work.pairs  # per pair and channel: a product for the logit, a product for the value
    directions = len(mixer.projection) if mixer.kernel in RANDOM else 0
    return work.tokens * width * (8.0 * directions if directions else 4.0 * width / block.heads)


def head_flops(head: nn.Module, work: Work) -> float:
    """Return the FLOPs of a head on the genes or the cells that it reads."""
    if isinstance(head, ClassDecoder):
        return work.cells * linear_flops(head)
    if isinstance(head, GeneClassDecoder):
        per_gene = linear_flops(head.token)
        return work.tokens * per_gene + work.cells * (linear_flops(head) - per_gene)
    if isinstance(head, ProductDecoder) and head.out is None:  # <W q, c> = <q, W^T c>: W meets cells, not genes
        of_cells = sum(linear_flops(layer) for layer in (head.project, head.nonzero) if layer is not None)
        return work.cells * of_cells + work.unknown * linear_flops(head.query)
    return work.unknown * linear_flops(head)


def linear_flops(module: nn.Module) -> float:
    """Return the FLOPs per row of a module's linear layers, itself included."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return sum(2.0 * layer.in_features * layer.out_features for layer in layers)


def training_flops(network: nn.Module, objectives: Iterable[Any], work: Work, step: int) -> float:
    """Return the FLOPs of all passes over some work in an optimizer step: 3 forwards with a backward, else 1.

    The passes are those of `FoundationModule`: one for all, one more for each objective with a second pass (there only
    value heads predict), and for losses between cells a pass without a graph per view, and one with a graph for each
    view after the first. A head counts in the passes in which an active objective reads it. All weights are taken to
    train.
    """
    model: Any = network
    active = [objective for objective in objectives if step >= objective.start_step]
    reads = [objective for objective in active if not objective.needs_second_pass]
    total = 3 * forward_flops(network, work, {head.task for objective in reads for head in objective.heads()})
    for objective in active:
        if objective.needs_second_pass:
            total += 3 * forward_flops(network, work, {head.task for head in objective.heads()})
    views = max((objective.views for objective in active if objective.scope == "global"), default=0)
    return total + (views + 3 * max(views - 1, 0)) * backbone_flops(model.backbone, work)


@dataclass(frozen=True)
class Device:
    """A GPU as its datasheet has it.

    Attributes:
        flops: dense bf16 tensor-core FLOP/s with float32 accumulation.
        memory: bytes.
        bandwidth: bytes per second of its memory.
        measured: FLOP/s of large bf16 matrix products as measured on one, where we have.
    """

    flops: float
    memory: float
    bandwidth: float
    measured: float | None = None

    @property
    def ceiling(self) -> float:
        """The measured FLOP/s, or else the datasheet's."""
        return self.measured or self.flops


# Vendors print the figure for 2:4 sparsity in large type, twice the dense one that stands here. NVIDIA's datasheets of
# H100 SXM5, H200 SXM, A100 SXM4 and L40S, and the Ada whitepaper (v2.1, appendix A) for the RTX 4090. Gigabytes are 1e9
# bytes, a few percent below what a driver reports: room for its own context. The 790 TFLOP/s of the H200 are the
# largest bf16 torch.matmul rate that we measured on one.
DEVICES: dict[str, Device] = {
    "h100": Device(989e12, 80e9, 3.35e12),
    "h200": Device(989e12, 141e9, 4.8e12, measured=790e12),
    "a100": Device(312e12, 80e9, 2.039e12),
    "a100-40": Device(312e12, 40e9, 1.555e12),
    "l40s": Device(362e12, 48e9, 0.864e12),
    "rtx4090": Device(165.2e12, 24e9, 1.008e12),
}
