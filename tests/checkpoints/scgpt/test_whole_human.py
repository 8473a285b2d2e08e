"""A checkpoint of the published whole-human model's layout and size, both ways, within bounds of time and memory."""

from __future__ import annotations

import gzip
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

# Converts what argv[1:] says and prints the CPU seconds and the peak memory in MB of the whole process (ru_maxrss of a
# child begins with that of its parent)
CONVERT = """
import resource, sys
from pathlib import Path
from scfm.cli import main
failed = main(["convert", *sys.argv[1:]])
used = resource.getrusage(resource.RUSAGE_SELF)
(peak,) = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(used.ru_utime + used.ru_stime, int(peak) / 1024)
sys.exit(failed)
"""


@pytest.mark.golden
@pytest.mark.slow
def test_whole_human_size_converts_both_ways(shared: Path, tmp_path: Path) -> None:
    layout = json.loads((shared / "golden/scgpt/published_whole_human_layout.json").read_text())
    original = tmp_path / "whole-human"
    write_checkpoint(original, layout, shared / "data/gene_vocab/scgpt_census_vocab.json.gz")
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    there = convert(original, "native", tmp_path / "native")
    back = convert(tmp_path / "native", "scgpt", tmp_path / "back")
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"both ways: {wall:.1f} s, {cpu:.1f} s of CPU; peaks {there[1]:.0f} and {back[1]:.0f} MB")
    assert cpu < 30
    assert max(there[1], back[1]) < 1500
    same_tensors(original, tmp_path / "back", n=163, n_parameters=51_330_049)
    tokens = json.loads((tmp_path / "back/vocab.json").read_text())
    assert len(tokens) == 60_697
    assert [tokens[token] for token in ("A1BG", "<pad>", "<cls>", "<eoc>")] == [0, 60_694, 60_695, 60_696]


def write_checkpoint(folder: Path, layout: dict, vocabulary: Path) -> None:
    """Write random weights; the vocabulary has no special tokens, as scGPT's own file has none."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in layout["keys"].items()}
    torch.save(state, folder / "best_model.pt")
    (folder / "args.json").write_text(json.dumps(layout["args_json_whole_human"]))
    (folder / "vocab.json").write_bytes(gzip.decompress(vocabulary.read_bytes()))


def convert(source: Path, to: str, out: Path) -> tuple[float, float]:
    """Convert in a process of its own; return its CPU seconds and peak memory in MB."""
    command = [sys.executable, "-c", CONVERT, str(source), "--to", to, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cpu, peak = done.stdout.splitlines()[-1].split()
    return float(cpu), float(peak)


def same_tensors(first: Path, second: Path, *, n: int, n_parameters: int) -> None:
    states = [torch.load(place / "best_model.pt", mmap=True, weights_only=True) for place in (first, second)]
    assert states[0].keys() == states[1].keys()
    assert len(states[0]) == n
    assert sum(tensor.numel() for tensor in states[1].values()) == n_parameters
    assert all(torch.equal(states[0][name].view(torch.int32), states[1][name].view(torch.int32)) for name in states[0])
