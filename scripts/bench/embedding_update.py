"""Is it worth updating only the rows of the gene embedding that a batch touches? One CPU thread, float32.

    scfm prepare --out SHARDS /path/to/*.h5ad
    OMP_NUM_THREADS=1 python scripts/bench/embedding_update.py --shards SHARDS

What is timed is all that hangs on the size of the table: dropping the gradient, the embedding's own backward over the
packs of a global batch, and the optimizer's step on the table. Three ways:

- dense: a gradient for every row and fused AdamW, as scfm trains;
- sparse: `nn.Embedding(sparse=True)` and torch.optim.SparseAdam;
- lazy: the batch's own rows gathered into a small table, Adam on these, scattered back.

The last two are another algorithm. Adam moves every row in every step: the moments of a row that was not touched decay,
and what is left of its momentum still moves it. Here such a row stands still with its moments frozen, and a gene that
is rare is moved by moments that are old.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from scfm.data.batch import PackedBatch
from scfm.data.loader import PackLoader
from scfm.data.order import CellOrder
from scfm.data.shards import open_shards
from scfm.data.tokens import TokenConfig, Tokeniser
from scfm.evaluation.provenance import provenance
from scfm.flops import Work, training_flops
from scfm.model import ScGPT
from scfm.objectives import Objective, build_objectives
from scfm.recipe import ModelConfig, ObjectiveConfig
from scfm.training.launch import keep_memory

ROWS, BINS = 60_697, 51  # of scGPT's whole-human vocabulary
LAYERS = {512: 12, 128: 4}  # of the models whose step the update is a share of; by width
HEADS = {512: 8, 128: 4}
LR, BETAS, EPS = 1e-4, (0.9, 0.999), 1e-8


class ByAutograd:
    """torch's embedding and one of its optimizers."""

    def __init__(self, width: int, sparse: bool) -> None:
        self.embedding = nn.Embedding(ROWS, width, sparse=sparse)
        self.table: Tensor = self.embedding.weight
        options: Any = {"lr": LR, "betas": BETAS, "eps": EPS}
        if sparse:
            self.optimizer: torch.optim.Optimizer = torch.optim.SparseAdam([self.embedding.weight], **options)
        else:
            self.optimizer = torch.optim.AdamW([self.embedding.weight], weight_decay=0.0, fused=True, **options)

    def look_up(self, packs: list[Tensor]) -> None:
        """Embed the genes of each pack, (T,) each; not timed, for it costs the same in all ways."""
        self.vectors = [self.embedding(genes) for genes in packs]

    def update(self, pulls: list[Tensor]) -> None:
        """Move the table by the gradient at the vectors of each pack, (T, D) each."""
        self.optimizer.zero_grad(set_to_none=True)
        for vectors, pull in zip(self.vectors, pulls, strict=True):
            vectors.backward(pull)
        self.optimizer.step()


class Lazy:
    """Adam on the rows that a batch touches; finding them is part of the update."""

    def __init__(self, width: int) -> None:
        self.table = nn.init.normal_(torch.empty(ROWS, width))
        self.first, self.second = torch.zeros_like(self.table), torch.zeros_like(self.table)
        self.steps = 0

    def look_up(self, packs: list[Tensor]) -> None:
        self.packs = packs

    def update(self, pulls: list[Tensor]) -> None:
        self.steps += 1
        touched = torch.zeros(ROWS, dtype=torch.bool)
        for genes in self.packs:
            touched[genes] = True
        rows, place = touched.nonzero()[:, 0], touched.cumsum(0) - 1
        gradient = torch.zeros(len(rows), self.table.shape[1])
        for genes, pull in zip(self.packs, pulls, strict=True):
            gradient += torch.ops.aten.embedding_dense_backward(pull, place[genes], len(rows), -1, False)
        m = self.first.index_select(0, rows).lerp_(gradient, 1 - BETAS[0])
        v = self.second.index_select(0, rows).mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        self.first.index_copy_(0, rows, m)
        self.second.index_copy_(0, rows, v)
        scale = v.div_(1 - BETAS[1] ** self.steps).sqrt_().add_(EPS)
        self.table.index_add_(0, rows, m.div_(scale), alpha=-LR / (1 - BETAS[0] ** self.steps))


WAYS: dict[str, Callable[[int], ByAutograd | Lazy]] = {
    "dense": lambda width: ByAutograd(width, sparse=False),
    "sparse": lambda width: ByAutograd(width, sparse=True),
    "lazy": Lazy,
}


def global_batch(shards: Path, cells: int, seed: int) -> list[PackedBatch]:
    """Return the packs of a global batch of real cells, as pretraining reads them."""
    store = open_shards(shards)
    tokeniser = Tokeniser(TokenConfig(), store.vocabulary, store.value_kind)
    order = CellOrder(range(store.n_cells), cells, seed)
    return PackLoader(store, order, tokeniser, tokens_per_pack=65_536).prepare(0, 0)


def time_updates(width: int, packs: list[Tensor], repeats: int) -> dict[str, float]:
    """Return the median seconds of CPU time of an update in each way; the ways take turns, for machines drift."""
    pulls = [torch.randn(len(genes), width) for genes in packs]
    ways = {name: make(width) for name, make in WAYS.items()}
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            way.look_up(packs)
            start = time.thread_time()
            way.update(pulls)
            spent[name].append(time.thread_time() - start)
    return {name: median(times[1:]) for name, times in spent.items()}


def network_of(width: int) -> ScGPT:
    """Return a model with GEP and GEPC whose table does not train, for what that costs is timed apart."""
    config = ModelConfig(width=width, heads=HEADS[width], layers=LAYERS[width], hidden=width)
    heads = [head for objective in pretraining() for head in objective.heads()]
    network = ScGPT(config, ROWS, ROWS - 2, BINS, {}, {}, heads).train()
    network.backbone.gene_embedding.embedding.weight.requires_grad_(False)
    return network


def pretraining() -> list[Objective]:
    return build_objectives([ObjectiveConfig("gep"), ObjectiveConfig("gepc")], n_bins=BINS)


def passes_of(network: ScGPT, packs: list[PackedBatch]) -> tuple[Callable[[], None], float]:
    """Return forward and backward of a global batch, and their FLOPs."""
    objectives = pretraining()

    def passes() -> None:
        network.zero_grad(set_to_none=True)
        for pack in packs:
            output = network(pack)
            torch.stack([objective.loss(pack, output)[0] for objective in objectives]).sum().backward()

    work = sum((Work.of(pack, "generative") for pack in packs), Work())
    return passes, training_flops(network, objectives, work, 0)


def time_passes(width: int, packs: list[PackedBatch], repeats: int) -> tuple[float, float]:
    """Return the median seconds of CPU time of forward and backward, and their FLOPs."""
    passes, flops = passes_of(network_of(width), packs)
    spent = []
    for _ in range(repeats + 1):
        start = time.thread_time()
        passes()
        spent.append(time.thread_time() - start)
    return median(spent[1:]), flops


def first_steps_differ_by() -> float:
    """Return the largest difference between the ways' first steps; without old moments all are Adam."""
    torch.manual_seed(0)
    genes, pull = torch.randint(0, ROWS, (500,)), torch.randn(500, 8)
    moved = []
    for make in WAYS.values():
        way = make(8)
        before = way.table.detach().clone()
        way.look_up([genes])
        way.update([pull])
        moved.append(way.table.detach() - before)
    return max(float((one - moved[0]).abs().max()) for one in moved[1:])


def measure(shards: Path, width: int, cells: int, pace: float, repeats: int) -> dict[str, float]:
    """Return the figures of a size of the global batch; `pace`: seconds of the model's passes per FLOP."""
    drawn = [global_batch(shards, cells, seed) for seed in range(3)]
    touched = [len(torch.cat([pack.genes for pack in packs]).unique()) for packs in drawn]
    tokens = [sum(pack.n_tokens for pack in packs) for packs in drawn]
    packs = [pack.genes.long() for pack in drawn[0]]
    row = {
        "width": width,
        "cells": cells,
        "tokens_per_cell": sum(tokens) / len(tokens) / cells,
        "rows_touched": sum(touched) / len(touched),
        "passes_ms": 1e3 * pace * passes_of(network_of(width), drawn[0])[1],
    }
    for name, seconds in time_updates(width, packs, repeats).items():
        row[f"{name}_ms"] = 1e3 * seconds
        row[f"{name}_share"] = row[f"{name}_ms"] / (row[f"{name}_ms"] + row["passes_ms"])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--cells", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    assert first_steps_differ_by() < 1e-6
    rows = []
    for width in LAYERS:
        # the passes take time by their FLOPs: they are timed on the smallest batch, and scaled to larger ones
        seconds, flops = time_passes(width, global_batch(options.shards, options.cells[0], seed=0), repeats=2)
        print(f"width {width}: passes of {options.cells[0]} cells {seconds:.2f} s, {flops / seconds / 1e9:.0f} GFLOP/s")
        for cells in options.cells:
            rows.append(measure(options.shards, width, cells, seconds / flops, options.repeats))
            print("  ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()), flush=True)
    print(json.dumps({"bench": "embedding_update", "rows": rows, **provenance()}))


if __name__ == "__main__":
    main()
