"""`scfm bench loader`: from shards on disk to packed training batches."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scfm.bench.cells import synthetic_block, synthetic_vocabulary
from scfm.bench.report import at_least_one, device_name, of_rates, publish
from scfm.data.access import ReadMode, choose
from scfm.data.loader import PackLoader
from scfm.data.order import CellOrder, mixing_of
from scfm.data.shards import Codec, ShardWriter, open_shards
from scfm.data.store import CellStore
from scfm.data.tokens import TokenConfig, Tokeniser
from scfm.data.transport import LEVEL
from scfm.recipe import TiePolicy

CELLS_PER_SHARD = 20_000
FILLED_BATCHES = 20


def loader(
    *,
    cells: int = 40_000,
    genes: int = 1500,
    vocabulary: int = 20_000,
    read: Literal["expressed", "all"] = "expressed",
    max_genes: int = 1199,
    values_as: Literal["binned", "log2"] = "binned",
    n_bins: int = 51,
    tie_policy: TiePolicy = "left",
    mask_ratios: Sequence[float] = (0.25, 0.5, 0.75),
    mask_candidates: Literal["all", "expressed"] = "all",
    mask_kept: float = 0.0,
    cells_per_batch: int = 512,
    tokens_per_pack: int = 65536,
    threads: int = 1,
    epochs: int = 3,
    codec: Codec = "packed",
    access: ReadMode = "auto",
    out: str | None = None,
) -> None:
    """Measure how fast synthetic cells on disk become packed training batches; the defaults are scGPT's sizes.

    Args:
        cells: Synthetic cells.
        genes: Mean number of expressed genes in a cell.
        vocabulary: Genes of the vocabulary.
        read: Whether the expressed genes of a cell become tokens, or all of the vocabulary.
        max_genes: Most genes of a cell that become tokens.
        values_as: Quantile bins (scGPT) or log2 (scBERT).
        n_bins: Number of value bins.
        tie_policy: Where equal values fall.
        mask_ratios: Shares of unknown genes, of which every cell draws one.
        mask_candidates: Genes that may be hidden.
        mask_kept: Share of the unknown genes that show their value.
        cells_per_batch: Cells in a global batch.
        tokens_per_pack: Most tokens in a pack.
        threads: Threads that prepare batches.
        epochs: Timed passes over the cells, after one that warms up.
        codec: Codec of the shards.
        access: As `data.read` in a recipe.
        out: File that also receives the JSON.
    """
    at_least_one(cells=cells, genes=genes, threads=threads, epochs=epochs)
    tokens = TokenConfig(
        genes=read, max_genes=max_genes, values=values_as, n_bins=n_bins, tie_policy=tie_policy,
        mask_ratios=tuple(mask_ratios), mask_candidates=mask_candidates, mask_kept=mask_kept,
    )  # fmt: skip
    result = bench_loader(
        cells, genes, vocabulary, tokens, cells_per_batch, tokens_per_pack, threads, epochs, codec, access
    )
    line = (
        f"loader: {result['cells_per_second']['median']:,.0f} cells/s "
        f"({result['cells_per_cpu_second']['median']:,.0f} per CPU second) of {result['tokens_per_cell']} tokens, "
        f"{codec} codec, threads: {threads}; filled packs are {result['empty_when_filled']:.2%} empty"
    )
    publish("loader", result, line, out)


def bench_loader(
    cells: int,
    genes: int,
    vocabulary: int,
    tokens: TokenConfig,
    cells_per_batch: int,
    tokens_per_pack: int,
    threads: int,
    epochs: int,
    codec: Codec,
    access: ReadMode,
) -> dict[str, Any]:
    """Return cells per second, by the wall and per second of CPU time of the whole process, best and median epoch.

    Shards are written to a temporary directory, memory-mapped and read shuffled, warm from the page cache.
    """
    with tempfile.TemporaryDirectory(prefix="scfm-bench-") as folder:
        mean_genes = _write_shards(Path(folder), cells, genes, vocabulary, codec)
        store = open_shards(folder)
        tokeniser = Tokeniser(tokens, store.vocabulary, store.value_kind)
        order = CellOrder(range(store.n_cells), cells_per_batch, 0, True, *mixing_of(shuffled=True))  # drawn at random
        reader = choose(store, access).reader
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
        "vocabulary": vocabulary,
        "read": tokens.genes,
        "max_genes": tokens.max_genes,
        "values": tokens.values,
        "n_bins": tokens.n_bins,
        "tie_policy": tokens.tie_policy,
        "mask_ratios": list(tokens.mask_ratios),
        "mask_candidates": tokens.mask_candidates,
        "mask_kept": tokens.mask_kept,
        "cells_per_batch": cells_per_batch,
        "tokens_per_pack": tokens_per_pack,
        "threads": threads,
        "codec": codec,
        "access": access,
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


def _write_shards(folder: Path, cells: int, genes: int, vocabulary: int, codec: Codec) -> float:
    """Write synthetic shards and return the mean number of expressed genes."""
    generator = np.random.default_rng(0)
    writer = ShardWriter(folder, synthetic_vocabulary(vocabulary), "counts", codec=codec)
    written = 0
    for first in range(0, cells, CELLS_PER_SHARD):
        block = synthetic_block(generator, min(CELLS_PER_SHARD, cells - first), genes, vocabulary)
        writer.write(block, {})
        written += len(block.genes)
    writer.finish()
    return written / cells
