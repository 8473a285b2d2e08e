"""Lance: cells as rows with two list columns, taken by number in truly random order.

lance_side.py build FOLDER | raw FOLDER CELLS
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from measured import measure

BATCH = 64
TOGETHER = 4096  # cells taken at once, as many as mix in scfm's windows of single cells


def build(folder: Path) -> None:
    """Write the cells of the h5ad files: vocabulary ids and counts of each, as uint16."""
    import h5py
    import lance
    import pyarrow as pa

    schema = pa.schema({"genes": pa.list_(pa.uint16()), "counts": pa.list_(pa.uint16())})

    def batches() -> Iterator[pa.RecordBatch]:
        for path in sorted(folder.glob("cells-*.h5ad")):
            with h5py.File(path) as file:
                rows = file["X"]
                starts = rows["indptr"][:]
                for first in range(0, len(starts) - 1, TOGETHER):
                    offsets = starts[first : first + TOGETHER + 1]
                    inside, at = slice(offsets[0], offsets[-1]), pa.array(offsets - offsets[0], pa.int32())
                    columns = [rows[name][inside].astype(np.uint16) for name in ("indices", "data")]
                    lists = [pa.ListArray.from_arrays(at, pa.array(column)) for column in columns]
                    yield pa.record_batch(lists, schema=schema)

    lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches()), folder / "lance")
    took = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"cpu": took.ru_utime + took.ru_stime, "peak_bytes": 1024 * took.ru_maxrss}))


def raw(folder: Path, cells: int) -> None:
    """Deliver batches of 64 truly random cells, of windows of 4,096 that are taken at once and sorted."""
    import lance

    def open_loader() -> Iterator[int]:
        data = lance.dataset(folder / "lance")
        order = np.random.default_rng(0).permutation(data.count_rows())

        def batches() -> Iterator[int]:
            for first in range(0, len(order), TOGETHER):
                taken = data.take(np.sort(order[first : first + TOGETHER]).tolist())
                for at in range(0, len(taken), BATCH):
                    yield len(taken.slice(at, BATCH))

        return batches()

    measure(open_loader, cells, ["pylance", "pyarrow", "numpy"])


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build(Path(sys.argv[2]))
    else:
        raw(Path(sys.argv[2]), int(sys.argv[3]))
