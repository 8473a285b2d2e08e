"""`scfm bench attention --mixer`: what scBERT's mixers cost by the number of genes in a cell, one cell at a time.

The operators alone, forward with backward. Mixers take turns. On a CPU one thread works and its CPU time counts. Memory
is what a call adds at its peak to queries, keys and values that are there: of CUDA's allocator, else of a process of
its own, whose malloc returns large blocks to the system: glibc's habit of keeping them can double what a call seems to
need, but returning them costs time, so that times are taken without it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scfm.bench.attention import TYPES, one_thread, with_backward
from scfm.bench.report import at_least_one, device_name, of_times, publish, significant
from scfm.ceiling import seconds_of
from scfm.errors import ScfmError
from scfm.evaluation.training_plots import cost_by_length
from scfm.model.performer import Segments, build_mixer, default_features
from scfm.recipe import ModelConfig, PerformerConfig

MIXERS = ("favor", "linear", "softmax")
WARM_UP = 64  # tokens of the call that comes before what is measured
KEPT_BY_MALLOC = 2**20  # bytes; larger blocks go back to the system


def publish_mixers(
    mixer: str,
    lengths: Sequence[int],
    heads: int,
    head_width: int,
    device: str,
    precision: str,
    repeats: int,
    out: str | None,
    plot: str | None,
) -> None:
    """Print what mixers cost, and draw it; arguments as those of `scfm bench attention`."""
    result = bench_mixers(mixer, lengths, heads, head_width, device, precision, repeats)
    lines = [
        f"mixers: one cell of {', '.join(f'{n:,}' for n in result['lengths'])} genes, {heads} heads of {head_width}, "
        f"{precision}, forward with backward, on {result['device']} ({result['clock']})"
    ]
    for name, row in result["mixers"].items():
        costs = [f"{s['median']:.3g} s, {mib:,.0f} MiB" for s, mib in zip(row["seconds"], row["peak_mib"], strict=True)]
        growth = f"; seconds grow as genes^{row['exponent']:.2f}" if "exponent" in row else ""
        lines.append(f"  {name:<9}{'; '.join(costs)}{growth}")
    publish("attention", result, "\n".join(lines), out)
    if plot is not None:
        curves = {
            name: ([s["median"] for s in row["seconds"]], row["peak_mib"]) for name, row in result["mixers"].items()
        }
        Path(plot).write_bytes(cost_by_length(result["lengths"], curves))


def bench_mixers(
    mixer: str,
    lengths: Sequence[int],
    heads: int,
    head_width: int,
    device: str = "cpu",
    precision: str = "32",
    repeats: int = 5,
) -> dict[str, Any]:
    """Return seconds and peak memory of each mixer at each length, and the exponent that fits its seconds.

    Raises ScfmError where the device is not there, or a number is not at least 1.
    """
    at_least_one(lengths=min(lengths, default=0), heads=heads, head_width=head_width, repeats=repeats)
    if device == "cuda" and not torch.cuda.is_available():
        raise ScfmError("--device cuda: there is no CUDA device here; choose --device cpu")
    place, names, lengths = torch.device(device), MIXERS if mixer == "all" else (mixer,), sorted(lengths)
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    peaks: dict[str, list[float]] = {name: [] for name in names}
    with one_thread():
        where = device_name(place)
        for length in lengths:
            calls = {name: call_of(name, length, heads, head_width, place, precision) for name in names}
            for name in names:
                call_of(name, WARM_UP, heads, head_width, place, precision)()
                peaks[name].append(peak_mib(name, length, heads, head_width, place, precision, calls[name]))
            rounds = [[seconds_taken(calls[name], place) for name in names] for _ in range(repeats)]
            for name, taken in zip(names, zip(*rounds, strict=True), strict=True):
                seconds[name].append(list(taken))
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        rows[name] = {"seconds": [of_times(taken) for taken in seconds[name]], "peak_mib": peaks[name]}
        if len(set(lengths)) > 1:
            rows[name]["exponent"] = significant(exponent(lengths, [median(taken) for taken in seconds[name]]), 3)
    return {
        "mixers": rows,
        "lengths": lengths,
        "heads": heads,
        "head_width": head_width,
        "features": default_features(head_width),
        "precision": precision,
        "repeats": repeats,
        "clock": "CUDA events" if device == "cuda" else "CPU time of one thread",
        "device": where,
    }


def exponent(lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """Return b of the power law seconds = a length^b that fits best, by least squares of logarithms."""
    return float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])


def call_of(
    name: str, length: int, heads: int, head_width: int, device: torch.device, precision: str
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a mixer's forward and backward on a cell of random queries, keys and values."""
    config: Any = {"mixer": name, "heads": heads, "performer": PerformerConfig(head_width=head_width)}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        mixer = build_mixer(ModelConfig(**config)).to(device)
        qkv = torch.randn(length, 3, heads, head_width, device=device, dtype=TYPES[precision]).requires_grad_()
        d_out = torch.randn(length, heads, head_width, device=device, dtype=TYPES[precision])
    cells = Segments(torch.tensor([0, length], dtype=torch.int32, device=device), length)
    return partial(with_backward, partial(mixer, segments=cells), qkv, d_out)


def seconds_taken(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call: of its kernels on a GPU, else CPU time of this thread."""
    if device.type == "cuda":
        return seconds_of(call, device)
    start = time.thread_time()
    call()
    return time.thread_time() - start


def peak_mib(
    name: str,
    length: int,
    heads: int,
    head_width: int,
    device: torch.device,
    precision: str,
    call: Callable[[], object],
) -> float:
    """Return the MiB that a call adds at its peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return significant((torch.cuda.max_memory_allocated(device) - before) / 2**20)
    shape = [str(x) for x in (name, length, heads, head_width, precision)]
    return peak_of_process([sys.executable, "-m", "scfm.bench.mixers", *shape])


def peak_of_process(command: Sequence[str]) -> float:
    """Return the MiB that a command prints, run on one thread with a malloc that returns large blocks."""
    settings = {"MALLOC_MMAP_THRESHOLD_": str(KEPT_BY_MALLOC), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ScfmError(f"the process that measures memory stopped with {done.returncode}: {done.stderr[-500:]}")
    return significant(float(done.stdout))


def growth_of(call: Callable[[], object]) -> float:
    """Return by how many MiB the resident memory of this process grows at the peak of a call (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    before = _resident("VmRSS")
    call()
    return (_resident("VmHWM") - before) / 1024


def _resident(what: str) -> int:
    """Return a figure of /proc/self/status in KiB: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def main(arguments: Sequence[str]) -> None:
    """Print the MiB that a mixer's forward and backward need here; name, length, heads, head width and precision."""
    name, precision = arguments[0], arguments[4]
    length, heads, head_width = (int(x) for x in arguments[1:4])
    here = torch.device("cpu")
    with one_thread():
        call_of(name, WARM_UP, heads, head_width, here, precision)()
        print(growth_of(call_of(name, length, heads, head_width, here, precision)))


if __name__ == "__main__":
    main(sys.argv[1:])
