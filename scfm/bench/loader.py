"""`scfm bench loader`: from shards on disk to packed training batches."""

from __future__ import annotations

import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from scfm.bench.cells import synthetic_block, synthetic_vocabulary
from scfm.bench.report import at_least_one, device_name, of_rates, publish
from scfm.data.access import ReadMode, choose
from scfm.data.loader import PackLoader
from scfm.data.order import CellOrder
from scfm.data.shards import Codec, ShardWriter, open_shards
from scfm.data.store import CellStore
from scfm.data.tokens import TokenConfig, Tokeniser
from scfm.data.transport import LEVEL
from scfm.recipe import TiePolicy

VOCABULARY_SIZE = 20_000
CELLS_PER_SHARD = 20_000
FILLED_BATCHES = 20


def loader(
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
    codec: Codec = "packed",
    read: ReadMode = "auto",
    out: str | None = None,
) -> None:
    """Measure how fast synthetic cells on disk become packed training batches; the defaults are scGPT's sizes.

    Args:
        cells: Synthetic cells.
        genes: Mean number of expressed genes in a cell.
        max_genes: Most genes of a cell that become tokens.
        n_bins: Number of value bins.
        tie_policy: Where equal values fall.
        cells_per_batch: Cells in a global batch.
        tokens_per_pack: Most tokens in a pack.
        threads: Threads that prepare batches.
        epochs: Timed passes over the cells, after one that warms up.
        codec: Codec of the shards.
        read: As `data.read` in a recipe.
        out: File that also receives the JSON.
    """
    at_least_one(cells=cells, genes=genes, threads=threads, epochs=epochs)
    tokens = TokenConfig(max_genes=max_genes, n_bins=n_bins, tie_policy=tie_policy)
    result = bench_loader(cells, genes, tokens, cells_per_batch, tokens_per_pack, threads, epochs, codec, read)
    line = (
        f"loader: {result['cells_per_second']['median']:,.0f} cells/s "
        f"({result['cells_per_cpu_second']['median']:,.0f} per CPU second) of {result['tokens_per_cell']} tokens, "
        f"{codec} codec, threads: {threads}; filled packs are {result['empty_when_filled']:.2%} empty"
    )
    publish("loader", result, line, out)


def bench_loader(
    cells: int,
    genes: int,
    tokens: TokenConfig,
    cells_per_batch: int,
    tokens_per_pack: int,
    threads: int,
    epochs: int,
    codec: Codec,
    read: ReadMode,
) -> dict[str, Any]:
    """Return cells per second, by the wall and per second of CPU time of the whole process, best and median epoch.

    Shards are written to a temporary directory, memory-mapped and read shuffled, warm from the page cache; scGPT's
    three mask ratios apply unless `tokens` says otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="scfm-bench-") as folder:
        mean_genes = _write_shards(Path(folder), cells, genes, codec)
        store = open_shards(folder)
        tokeniser = Tokeniser(tokens, store.vocabulary, store.value_kind)
        order = CellOrder(range(store.n_cells), cells_per_batch, seed=0)
        reader = choose(store, read).reader
        packs_of = PackLoader(store, order, tokeniser, tokens_per_pack=tokens_per_pack, reader=reader, threads=threads)
        n_read = len(order) * cells_per_batch
        walls, cpus, n_tokens = [], [], 0
        for epoch in range(epochs + 1):
            wall, cpu, n_tokens = time.perf_counter(), time.process_time(), 0
            for packs in packs_of.batches(epoch):
                n_tokens += sum(pack.n_tokens for pack in packs)
            if epoch > 0:  # the first epoch compiles the kernels and reads the files
                walls.append(n_read / (time.perf_counter() - wall))
                cpus.append(n_read / (time.process_time() - cpu))
        empty = empty_when_filled(store, order, tokeniser, tokens_per_pack)
        plain, compressed = _bytes_per_cell(store)
    return {
        "device": device_name("cpu"),
        "cells_per_second": of_rates(walls, 6),
        "cells_per_cpu_second": of_rates(cpus, 6),
        "empty_when_filled": empty,
        "tokens_per_cell": round(n_tokens / n_read, 1),
        "genes_per_cell": round(mean_genes, 1),
        "cells": cells,
        "max_genes": tokens.max_genes,
        "n_bins": tokens.n_bins,
        "tie_policy": tokens.tie_policy,
        "mask_ratios": list(tokens.mask_ratios),
        "cells_per_batch": cells_per_batch,
        "tokens_per_pack": tokens_per_pack,
        "threads": threads,
        "codec": codec,
        "read": read,
        "bytes_per_cell": plain,
        "bytes_per_cell_zstd": compressed,
        "epochs": epochs,
    }


def empty_when_filled(store: CellStore, order: CellOrder, tokeniser: Tokeniser, tokens_per_pack: int) -> float:
    """Return the share of the tokens of filled packs that belong to no cell, over the first twenty global batches."""
    filled = PackLoader(store, order, tokeniser, tokens_per_pack=tokens_per_pack, fill_packs=True)
    packs = [pack for batch in islice(filled.batches(epoch=0), FILLED_BATCHES) for pack in batch]
    return round(1 - sum(pack.sizes.tokens for pack in packs) / sum(pack.n_tokens for pack in packs), 5)


def _bytes_per_cell(store: CellStore) -> tuple[float, float]:
    """Return what a cell takes on disk, and what it takes where `scfm compress` made shards smaller for transport."""
    import pyarrow as pa

    first = store.files[0].path.read_bytes()
    packed = pa.Codec("zstd", compression_level=LEVEL).compress(first)
    n = store.blocks[0].n_cells
    return round(len(first) / n, 1), round(len(packed) / n, 1)


def _write_shards(folder: Path, cells: int, genes: int, codec: Codec) -> float:
    """Write synthetic shards and return the mean number of expressed genes."""
    generator = np.random.default_rng(0)
    writer = ShardWriter(folder, synthetic_vocabulary(VOCABULARY_SIZE), "counts", codec=codec)
    written = 0
    for first in range(0, cells, CELLS_PER_SHARD):
        block = synthetic_block(generator, min(CELLS_PER_SHARD, cells - first), genes, VOCABULARY_SIZE)
        writer.write(block, {})
        written += len(block.genes)
    writer.finish()
    return written / cells
