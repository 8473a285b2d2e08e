"""A million vectors of width 512 in under 1.2 GB: all memory of the process, the mapped file included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MOST = 1.2e9
CELLS, WIDTH = 1_000_000, 512

# argv: folder. Prints the peak of the process in bytes, of that the memory that no file backs, and CPU seconds.
MEASURED = """
import sys, time
import numpy as np
from scfm.mapping import ReferenceIndex

def unit_vectors(n, rng):
    vectors = rng.standard_normal((n, {width}), dtype=np.float32)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)

{work}
said = {{line.split(":")[0]: line.split() for line in open("/proc/self/status")}}
print(int(said["VmHWM"][1]) * 1024, int(said["RssAnon"][1]) * 1024, time.process_time())
"""

BUILD = """
vectors, rng = np.empty(({cells}, {width}), np.float16), np.random.default_rng(0)
for first in range(0, {cells}, 10_000):
    vectors[first : first + 10_000] = unit_vectors(10_000, rng)
labels = np.array(["A", "B"])[np.arange({cells}) % 2]
about = {{"hash": "", "source": "", "width": {width}}}
cells = np.arange({cells}, dtype=np.uint64)
ReferenceIndex.from_vectors(vectors, {{"cell_type": labels}}, cells=cells, model=about).save(sys.argv[1])
"""

QUERY = """
index = ReferenceIndex.load(sys.argv[1])
first = index.content.parts[0].vectors[:10].copy()
noise = unit_vectors(990, np.random.default_rng(1))
distances, rows = index.neighbours(np.concatenate([first, noise]))
assert (rows[:10, 0] == np.arange(10)).all() and (distances[:10, 0] == 0).all()
index.vote("cell_type", distances, rows)
"""


def measured(work: str, folder: Path) -> tuple[int, int, float]:
    sizes = {"cells": CELLS, "width": WIDTH}
    script = MEASURED.format(work=work.format(**sizes), **sizes)
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, anonymous, seconds = done.stdout.split()
    return int(peak), int(anonymous), float(seconds)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_million_vectors_of_width_512_take_less_than_1_2_gb(tmp_path: Path) -> None:
    for name, work in (("built, calibrated and saved", BUILD), ("loaded, 1,000 cells mapped", QUERY)):
        peak, anonymous, seconds = measured(work, tmp_path / "index")
        print(f"{name}: peak {peak / 1e9:.3f} GB, of it {anonymous / 1e9:.3f} GB without a file; {seconds:.0f} CPU s")
        assert peak < MOST
    on_disk = sum(path.stat().st_size for path in (tmp_path / "index").iterdir())
    print(f"on the disk: {on_disk / 1e9:.3f} GB")
    assert on_disk < MOST
