"""scfm: packed training batches, or raw cells, from a shard directory.

scfm_side.py build FOLDER | few FOLDER | WHAT FOLDER map|read BLOCKxWINDOW CELLS, WHAT being tokens or raw
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from tempfile import TemporaryDirectory

from measured import measure

BATCH, LENGTH = 64, 1200
PACKAGES = ["scfm", "numba", "numpy", "torch", "pyarrow"]


def build(folder: Path) -> None:
    """Run `scfm prepare` with one worker process, as users do."""
    files = [str(path) for path in sorted(folder.glob("cells-*.h5ad"))]
    command = [sys.executable, "-m", "scfm.cli", "prepare", *files, "--out", str(folder / "shards"), "--workers", "1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    took = getrusage(RUSAGE_CHILDREN)
    print(json.dumps({"cpu": took.ru_utime + took.ru_stime, "peak_bytes": 1024 * took.ru_maxrss}))


def few(folder: Path) -> None:
    """Write a few other cells, on which kernels are loaded: the first batch of the measured ones must stay cold."""
    import numpy as np

    from scfm.bench.cells import synthetic_block, synthetic_vocabulary
    from scfm.data.shards import ShardWriter

    writer = ShardWriter(folder, synthetic_vocabulary(20_000), "counts", codec="packed")
    for _ in range(2):
        writer.write(synthetic_block(np.random.default_rng(0), 256, 1500, 20_000), {})
    writer.finish()


def deliver(what: str, folder: Path, mode: str, mixing: str, cells: int) -> None:
    """Deliver batches of 64: one thread makes tokens, or two decode raw cells, and others read ahead.

    Cells mix as they do by default, or within windows of so many blocks of so many cells; blocks of 1 are true random
    order.
    """
    from scfm.data.access import choose
    from scfm.data.loader import PackLoader
    from scfm.data.order import CellOrder, mixing_of
    from scfm.data.raw import raw_batches
    from scfm.data.shards import open_shards
    from scfm.data.tokens import TokenConfig, Tokeniser

    def batches_of(shards: Path) -> Iterator[int]:
        store = open_shards(shards)
        block, window = mixing_of(store.shuffled) if mixing == "default" else map(int, mixing.split("x"))
        order = CellOrder(range(store.n_cells), BATCH, seed=0, block=block, window=window)
        reader = choose(store, mode).reader
        if what == "raw":
            return (cells.n_cells for _, cells in raw_batches(store, order, 0, reader, threads=2))
        tokeniser = Tokeniser(TokenConfig(max_genes=LENGTH - 1, n_bins=51), store.vocabulary, store.value_kind)
        loader = PackLoader(store, order, tokeniser, tokens_per_pack=BATCH * LENGTH, reader=reader)
        return (sum(pack.n_cells for pack in packs) for packs in loader.batches(0))

    with TemporaryDirectory() as elsewhere:  # made by another process, which keeps its memory to itself
        subprocess.run([sys.executable, __file__, "few", elsewhere], check=True)
        sum(batches_of(Path(elsewhere)))
    measure(lambda: batches_of(folder / "shards"), cells, PACKAGES)


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build(Path(sys.argv[2]))
    elif sys.argv[1] == "few":
        few(Path(sys.argv[2]))
    else:
        deliver(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))
