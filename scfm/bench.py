"""`scfm bench`: measures scfm itself, so that a number always comes with its device, shapes and commit."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scfm.data.loader import PackLoader
from scfm.data.order import CellOrder
from scfm.data.shards import ShardWriter, open_shards
from scfm.data.store import CellBlock
from scfm.data.tokens import TokenConfig, Tokeniser
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.evaluation.provenance import provenance
from scfm.recipe import TiePolicy

VOCABULARY_SIZE = 20_000
CELLS_PER_SHARD = 20_000


def bench(
    what: Literal["loader"],
    *,
    cells: int = 40_000,
    genes: int = 1500,
    max_genes: int = 1199,
    n_bins: int = 51,
    tie_policy: TiePolicy = "left",
    cells_per_batch: int = 512,
    tokens_per_pack: int = 65536,
    threads: int = 1,
    epochs: int = 3,
    out: str | None = None,
) -> None:
    """Measure a part of scfm on synthetic cells and print the result as JSON.

    Args:
        what: `loader`: from shards on disk to packed training batches.
        cells: Synthetic cells.
        genes: Mean number of expressed genes in a cell.
        max_genes: Most genes of a cell that become tokens.
        n_bins: Number of value bins.
        tie_policy: Where equal values fall.
        cells_per_batch: Cells in a global batch.
        tokens_per_pack: Most tokens in a pack.
        threads: Threads that prepare batches.
        epochs: Timed passes over the cells, after one that warms up.
        out: File that also receives the JSON.
    """
    tokens = TokenConfig(max_genes=max_genes, n_bins=n_bins, tie_policy=tie_policy)
    result = bench_loader(cells, genes, tokens, cells_per_batch, tokens_per_pack, threads, epochs)
    text = json.dumps({"bench": what, **result, **provenance()}, indent=1)
    if out is not None:
        Path(out).write_text(text + "\n", encoding="utf-8")
    print(text)


def bench_loader(
    cells: int, genes: int, tokens: TokenConfig, cells_per_batch: int, tokens_per_pack: int, threads: int, epochs: int
) -> dict[str, Any]:
    """Return cells per second, by the wall and per second of CPU time of the whole process, best and median epoch.

    Shards are written to a temporary directory, memory-mapped and read shuffled, warm from the page cache; scGPT's
    three mask ratios apply unless `tokens` says otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="scfm-bench-") as folder:
        mean_genes = _write_shards(Path(folder), cells, genes)
        store = open_shards(folder)
        tokeniser = Tokeniser(tokens, store.vocabulary, store.value_kind)
        order = CellOrder(range(store.n_cells), cells_per_batch, seed=0)
        loader = PackLoader(store, order, tokeniser, tokens_per_pack=tokens_per_pack, threads=threads)
        read = len(order) * cells_per_batch
        walls, cpus, n_tokens = [], [], 0
        for epoch in range(epochs + 1):
            wall, cpu, n_tokens = time.perf_counter(), time.process_time(), 0
            for packs in loader.batches(epoch):
                n_tokens += sum(pack.n_tokens for pack in packs)
            if epoch > 0:  # the first epoch compiles the kernels and reads the files
                walls.append(read / (time.perf_counter() - wall))
                cpus.append(read / (time.process_time() - cpu))
    return {
        "cells_per_second": {"best": round(max(walls)), "median": round(float(np.median(walls)))},
        "cells_per_cpu_second": {"best": round(max(cpus)), "median": round(float(np.median(cpus)))},
        "tokens_per_cell": round(n_tokens / read, 1),
        "genes_per_cell": round(mean_genes, 1),
        "cells": cells,
        "max_genes": tokens.max_genes,
        "n_bins": tokens.n_bins,
        "tie_policy": tokens.tie_policy,
        "mask_ratios": list(tokens.mask_ratios),
        "cells_per_batch": cells_per_batch,
        "tokens_per_pack": tokens_per_pack,
        "threads": threads,
        "epochs": epochs,
    }


def _write_shards(folder: Path, cells: int, genes: int) -> float:
    """Write synthetic shards and return the mean number of expressed genes.

    Depth is lognormal from cell to cell as in 10x data; 70 % of the counts are 1, and a few genes have hundreds.
    """
    generator = np.random.default_rng(0)
    vocabulary = Vocabulary.from_genes(Gene.of(None, f"G{i:05d}") for i in range(VOCABULARY_SIZE))
    writer = ShardWriter(folder, vocabulary, "counts")
    written = 0
    for first in range(0, cells, CELLS_PER_SHARD):
        block = _synthetic_block(generator, min(CELLS_PER_SHARD, cells - first), genes)
        writer.write(block, {})
        written += len(block.genes)
    writer.finish()
    return written / cells


def _synthetic_block(generator: np.random.Generator, cells: int, genes: int) -> CellBlock:
    spread = 0.43
    sizes = np.clip(generator.lognormal(np.log(genes) - spread**2 / 2, spread, cells), 1, VOCABULARY_SIZE).astype(int)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    ids: NDArray[np.uint32] = np.concatenate(
        [np.sort(generator.choice(VOCABULARY_SIZE, size, replace=False)) for size in sizes]
    ).astype(np.uint32)
    counts = generator.geometric(0.7, len(ids))
    abundant = generator.random(len(ids)) < 0.005
    counts[abundant] += generator.geometric(0.01, abundant.sum())
    return CellBlock(offsets.astype(np.int32), ids, counts.astype(np.uint32))
