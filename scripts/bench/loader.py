"""Loading beside named peers: the same cells in one run, in turns; each loader in its own process and Python.

    OMP_NUM_THREADS=1 python scripts/bench/loader.py FOLDER --annbatch PYTHON --lance PYTHON --scgpt SOURCE --out FILE

FOLDER receives 7 GB: 200,000 synthetic cells of 20,000 genes, 1,500 of them expressed, as gzipped h5ad, and what each
loader makes of them; what is there already is used again. PYTHON is one of an environment with annbatch (3.12 or newer,
`pip install annbatch[zarrs]==0.3.1`) or with Lance (`pip install pylance h5py`), SOURCE the unpacked source of scGPT
0.2.4. A side that is missing or fails is a row that says why.

Cold means: before the process starts, every file of its data was written back and dropped from the page cache by
posix_fadvise(DONTNEED), which needs no rights; what was read from the disk is printed beside it. A hypervisor may cache
all the same. Rates are cells per second of the wall, and of CPU time over all threads; medians of the rounds. The speed
of a shared machine changes within minutes, so what is compared runs close together, a loader warm and cold one after
the other and those of one group in a row, and ratios are medians of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from loaders.made_up import write_cells

from scfm.bench.report import device_name, significant
from scfm.evaluation.provenance import provenance

CELLS, GENES, EXPRESSED = 200_000, 20_000, 1500
HERE = Path(__file__).parent / "loaders"
# freed memory is kept, as `scfm pretrain` does; all sides get it
MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


@dataclass(frozen=True)
class Side:
    """One loader in one setting.

    Attributes:
        name: of the row.
        group: what is compared: `tokens`, `raw` or `random`.
        python: that runs it; None where it is missing.
        command: script of the folder `loaders` and its arguments.
        data: what it reads, in the folder of the run.
        ours: whether it is scfm.
    """

    name: str
    group: str
    python: str | None
    command: tuple[str, ...]
    data: str
    ours: bool = False


def sides(folder: Path, annbatch: str | None, lance: str | None, scgpt: str | None, cells: int) -> list[Side]:
    """Return all loaders; slow ones deliver fewer cells."""
    here, at, some = sys.executable, str(folder), str(cells)
    fifth, few, fewer = str(cells // 5), str(cells // 20), str(cells // 100)
    ours = "scfm_side.py"
    of_annbatch = ("annbatch_side.py", "raw", at)
    of_scgpt = ("scgpt_side.py", "tokens", at, scgpt or "", "0", few)
    return [
        Side("scfm tokens, map", "tokens", here, (ours, "tokens", at, "map", "default", some), "shards", True),
        Side("scfm tokens, read", "tokens", here, (ours, "tokens", at, "read", "default", some), "shards", True),
        Side("scGPT pipeline", "tokens", here if scgpt else None, of_scgpt, "scgpt"),
        Side("scfm raw, map", "raw", here, (ours, "raw", at, "map", "default", some), "shards", True),
        Side("scfm raw, read", "raw", here, (ours, "raw", at, "read", "default", some), "shards", True),
        Side("annbatch uint16, chunks of 512", "raw", annbatch, (*of_annbatch, "512", some), "annbatch.zarr"),
        Side("annbatch uint16, chunks of 64", "raw", annbatch, (*of_annbatch, "64", some), "annbatch.zarr"),
        Side("scfm raw, true random, read", "random", here, (ours, "raw", at, "read", "1x4096", some), "shards", True),
        Side("annbatch uint16, chunks of 1", "random", annbatch, (*of_annbatch, "1", few), "annbatch.zarr"),
        Side("Lance, 4,096 taken at once", "random", lance, ("lance_side.py", "raw", at, fifth), "lance"),
        Side("AnnData backed, gzipped", "random", here, ("backed_side.py", "raw", at, fewer), ""),
    ]


def drop_from_cache(path: Path) -> None:
    """Write the files of a folder back and drop them from the page cache."""
    for file in (file for file in path.rglob("*") if file.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def warm(path: Path) -> None:
    """Read the files of a folder once, so that they lie in the page cache."""
    for file in (file for file in path.rglob("*") if file.is_file()):
        with file.open("rb") as opened:
            while opened.read(2**24):
                pass


def run(python: str, command: tuple[str, ...]) -> dict[str, Any]:
    """Run a script of the folder `loaders` and return what it printed last, or why it failed."""
    done = subprocess.run(
        [python, str(HERE / command[0]), *command[1:]], env=os.environ | MEMORY, capture_output=True, text=True
    )
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def make(folder: Path, annbatch: str | None, lance: str | None, scgpt: str | None) -> dict[str, Any]:
    """Build what is missing, and return what building took."""
    write_cells(folder, CELLS, GENES, EXPRESSED)
    built = {}
    for python, script, data in (
        (sys.executable, "scfm_side.py", "shards"),
        (annbatch, "annbatch_side.py", "annbatch.zarr"),
        (lance, "lance_side.py", "lance"),
        (sys.executable if scgpt else None, "scgpt_side.py", "scgpt"),
    ):
        if python and not (folder / data).exists():
            built[data] = run(python, (script, "build", str(folder)))
    return built


def compare(found: list[Side], folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Run all sides in turns, in another order each round, warm and cold, and return a row for each."""
    results: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    shuffled = random.Random(0)
    groups = sorted({side.group for side in found})
    for turn in range(rounds + 1):
        for group in shuffled.sample(groups, len(groups)):
            beside = [side for side in found if side.group == group and side.python]
            for side in shuffled.sample(beside, len(beside)):
                for cold in shuffled.sample((False, True), 2):
                    if turn == 0 and (cold or not side.ours):
                        continue  # the first round, of few cells, only compiles what is not compiled yet
                    (drop_from_cache if cold else warm)(folder / side.data if side.data else folder)
                    command = (*side.command[:-1], "2000") if turn == 0 else side.command
                    result = run(side.python or "", command)
                    if turn or "failed" in result:
                        results.setdefault((side.name, cold), []).append(result)
                    print(turn, side.name, "cold" if cold else "warm", json.dumps(result), file=sys.stderr, flush=True)
    return [row_of(side, cold, results, found) for side in found for cold in (False, True)]


def row_of(
    side: Side, cold: bool, results: dict[tuple[str, bool], list[dict[str, Any]]], found: list[Side]
) -> dict[str, Any]:
    """Return what the rounds of a loader amount to, beside the best peer of its group, and cold beside warm."""
    row: dict[str, Any] = {"loader": side.name, "group": side.group, "ours": side.ours, "cold": cold}
    some = results.get((side.name, cold), [])
    if not side.python or any("failed" in one for one in some):
        return row | {"missing": next((one["failed"] for one in some if "failed" in one), "not installed")}
    row |= {
        "open_seconds": significant(median(one["open"] for one in some), 2),
        "private_mb": round(median(one["private_bytes"] for one in some) / 1e6),
        "kb_read_per_cell": significant(median(one["bytes_read"] / one["cells"] for one in some) / 1e3, 3),
        "load": [round(one["load"], 1) for one in some],
        "runs": len(some),
        "versions": some[0]["versions"],
    }
    peers = [results.get((peer.name, cold), []) for peer in found if peer.group == side.group and not peer.ours]
    peers = [rounds for rounds in peers if rounds and not any("failed" in one for one in rounds)]
    warm_ones = results.get((side.name, False), [])
    for rate, seconds in (("cells_per_second", "wall"), ("cells_per_cpu_second", "cpu")):
        rates = [one["cells"] / one[seconds] for one in some]
        row[rate] = significant(median(rates))
        row[f"{rate}_of_rounds"] = [significant(one) for one in rates]
        if side.ours and peers:
            best = [max(one["cells"] / one[seconds] for one in round_of) for round_of in zip(*peers, strict=True)]
            row[f"{rate}_to_best_peer"] = _ratio(rates, best)
        if cold and not any("failed" in one for one in warm_ones):
            row[f"{rate}_to_warm"] = _ratio(rates, [one["cells"] / one[seconds] for one in warm_ones])
    return row


def _ratio(rates: list[float], beside: list[float]) -> float:
    return significant(median(one / other for one, other in zip(rates, beside, strict=True)), 3)


def bytes_per_cell(folder: Path) -> dict[str, float]:
    """Return what a cell takes on disk in each format, and scfm's as zstd for transport."""
    import pyarrow as pa

    from scfm.data.transport import LEVEL

    taken = {}
    for data in ("shards", "annbatch.zarr", "lance", "scgpt"):
        if (folder / data).exists():
            taken[data] = sum(file.stat().st_size for file in (folder / data).rglob("*") if file.is_file()) / CELLS
    first = next((folder / "shards/shards").iterdir()).read_bytes()
    compressed = len(pa.Codec("zstd", compression_level=LEVEL).compress(first))
    return {name: significant(n) for name, n in taken.items()} | {
        "shards as zstd": significant(taken["shards"] * compressed / len(first))
    }


def as_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    heads = ["loader", "cache", "cells/s", "per CPU second", "to the best peer: wall", "CPU", "to warm: wall", "CPU",
             "private MB", "KB read a cell", "load"]  # fmt: skip
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        line = [row["loader"], "cold" if row["cold"] else "warm"]
        if "missing" in row:
            line.append(row["missing"])
        elif "runs" in row:
            rates = ("cells_per_second", "cells_per_cpu_second")
            line += [f"{row[rate]:,.0f}" for rate in rates]
            line += [str(row.get(f"{rate}_to_{other}", "")) for other in ("best_peer", "warm") for rate in rates]
            line += [str(row["private_mb"]), str(row["kb_read_per_cell"])]
            line.append(f"{min(row['load'])} to {max(row['load'])}")
        lines.append(line + [""] * (len(heads) - len(line)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--annbatch", help="a Python that has annbatch")
    parser.add_argument("--lance", help="a Python that has pylance and h5py")
    parser.add_argument("--scgpt", help="the source of scGPT 0.2.4, unpacked")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cells", type=int, default=CELLS, help="that fast loaders deliver in a run; slow ones fewer")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    built = make(options.folder, options.annbatch, options.lance, options.scgpt)
    found = sides(options.folder, options.annbatch, options.lance, options.scgpt, options.cells)
    rows = compare(found, options.folder, options.rounds)
    result = {
        "bench": "loader_peers",
        "device": device_name("cpu"),
        "cells": CELLS,
        "genes": GENES,
        "expressed": EXPRESSED,
        "cells_delivered": options.cells,
        "batch": 64,
        "rounds": options.rounds,
        "bytes_per_cell": bytes_per_cell(options.folder),
        "built": built,
        "rows": rows,
        **provenance(),
    }
    print(as_table(rows))
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
