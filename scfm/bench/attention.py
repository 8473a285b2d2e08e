"""`scfm bench attention`: the operator alone, every backend that runs on a device beside the dense mask.

Backends take turns, so that a machine that slows down slows all of them down. What a backend lays out once per pack
(boundaries, block masks) is not timed: all layers share it. On a CPU one thread works, and its CPU time counts: neither
other processes nor threads that wait for each other change it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from scfm.bench.report import at_least_one, device_name, of_times, publish, significant
from scfm.ceiling import seconds_of
from scfm.errors import ScfmError
from scfm.model.attention import BACKENDS, Attention, AttentionLayout, pick_backend, prepare, why_not

TYPES = {"32": torch.float32, "bf16": torch.bfloat16}
TIMED_SECONDS = 0.05  # a measurement repeats the call until it takes about this long
MOST_LOGITS = 2**26  # of float64, 0.5 GB a copy
DENSE = "dense"


@dataclass(frozen=True)
class Shape:
    """Cells of one length, of which some of the genes are known.

    Attributes:
        cells: N.
        tokens: of each cell, `<cls>` included.
        known: visible keys of each cell, `<cls>` included.
        heads: H.
        width: of a head, d.
    """

    cells: int
    tokens: int
    known: int
    heads: int
    width: int

    @property
    def pairs(self) -> int:
        """Query-key pairs that the mask allows."""
        return self.cells * (self.tokens * self.known + self.tokens - self.known)

    @property
    def forward_flops(self) -> float:
        """FLOPs of the forward; with the backward it is three times as many."""
        return 4.0 * self.pairs * self.width * self.heads

    def layout(self, device: torch.device) -> AttentionLayout:
        """Return where the cells lie."""
        total = self.cells * self.tokens
        cu_seqlens = torch.arange(0, total + 1, self.tokens, dtype=torch.int32, device=device)
        n_keys = torch.full((self.cells,), self.known, dtype=torch.int32, device=device)
        return AttentionLayout(cu_seqlens, n_keys, total, self.tokens)


def attention(
    *,
    cells: int = 8,
    tokens: int = 1024,
    heads: int = 8,
    head_width: int = 64,
    known: float = 0.5,
    device: Literal["cpu", "cuda"] = "cpu",
    precision: Literal["32", "bf16"] = "32",
    repeats: int = 7,
    mixer: Literal["favor", "linear", "softmax", "all"] | None = None,
    lengths: Sequence[int] = (2048, 4096, 8192, 16384),
    plot: str | None = None,
    out: str | None = None,
) -> None:
    """Time attention forward, and forward with backward, of each backend beside the dense mask; or scBERT's mixers.

    Args:
        cells: Cells, all equally long: the dense mask, which pads cells to one length, has nothing to pad.
        tokens: Tokens of a cell, <cls> included.
        heads: Attention heads.
        head_width: Width of a head.
        known: Share of a cell's genes that all its tokens see; 1 is full attention.
        device: Where it runs.
        precision: Type of queries, keys and values.
        repeats: Rounds in which each backend, or mixer, is timed once.
        mixer: Time this mixer of scBERT, or all of them, on one cell with full attention instead of the backends.
        lengths: With --mixer, genes of the cell.
        plot: With --mixer, a .png file for the curves.
        out: File that also receives the JSON.
    """
    if mixer is not None:
        from scfm.bench.mixers import publish_mixers

        return publish_mixers(mixer, lengths, heads, head_width, device, precision, repeats, out, plot)
    result = bench_attention(cells, tokens, heads, head_width, known, device, precision, repeats)
    backends = result["backends"]
    lines = [
        f"attention: {cells} cells of {tokens} tokens, {known:.0%} known, {heads} heads of {head_width}, {precision}, "
        f"on {result['device']} ({result['clock']})"
    ]
    for name, row in backends.items():
        both = row["forward_backward"]
        lines.append(
            f"  {name:<13}forward {row['forward']['ms']['median']:>9.4g} ms  "
            f"with backward {both['ms']['median']:>9.4g} ms, {both['tflops']:.4g} TFLOP/s, "
            f"{both['speed_to_dense']:.3g}x dense"
        )
    publish("attention", result, "\n".join(lines), out)
    return None


def bench_attention(
    cells: int,
    tokens: int,
    heads: int,
    head_width: int,
    known: float,
    device: str = "cpu",
    precision: str = "32",
    repeats: int = 7,
) -> dict[str, Any]:
    """Return times, ratios, TFLOP/s and errors of each backend; arguments as those of `attention`.

    Raises ScfmError where the device is not there, or the shape is none.
    """
    at_least_one(cells=cells, tokens=tokens, heads=heads, head_width=head_width, repeats=repeats)
    if not 0 <= known <= 1:
        raise ScfmError(f"--known: {known} must be a share from 0 to 1")
    if device == "cuda" and not torch.cuda.is_available():
        raise ScfmError("--device cuda: there is no CUDA device here; choose --device cpu")
    place, dtype = torch.device(device), TYPES[precision]
    shape = Shape(cells, tokens, 1 + round(known * (tokens - 1)), heads, head_width)
    against = {name: why_not(name, place, dtype, head_width) for name in BACKENDS}
    names = [name for name, reason in against.items() if reason is None]
    with torch.random.fork_rng(devices=[place] if device == "cuda" else []):
        torch.manual_seed(0)
        qkv = torch.randn(cells * tokens, 3, heads, head_width, device=place, dtype=dtype)
        d_out = torch.randn(cells * tokens, heads, head_width, device=place, dtype=dtype)
    layout = shape.layout(place)
    errors = errors_of(names, layout, shape, qkv, d_out)
    with one_thread():
        times = times_of(names, layout, qkv, d_out, repeats)
        where = device_name(place)
    rows = {}
    for name in names:
        rows[name] = {
            what: {
                "ms": of_times([1000 * seconds for seconds in taken]),
                "speed_to_dense": significant(
                    median(dense / mine for dense, mine in zip(times[DENSE][what], taken, strict=True))
                ),
                "tflops": significant(flops / median(taken) / 1e12),
            }
            for (what, taken), flops in zip(
                times[name].items(), (shape.forward_flops, 3 * shape.forward_flops), strict=True
            )
        } | errors.get(name, {})
    return {
        "backends": rows,
        "not_run": {name: reason for name, reason in against.items() if reason is not None},
        "auto": pick_backend(place, dtype, head_width)[0],
        "clock": "CUDA events" if device == "cuda" else "CPU time of one thread",
        "device": where,
        "precision": precision,
        "cells": cells,
        "tokens": tokens,
        "known_tokens": shape.known,
        "heads": heads,
        "head_width": head_width,
        "pairs": shape.pairs,
        "repeats": repeats,
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on a single CPU thread inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def times_of(
    names: list[str], layout: AttentionLayout, qkv: Tensor, d_out: Tensor, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of each backend's forward and forward with backward in each of the rounds."""
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "forward_backward": []} for name in names}
    leaf = qkv.clone().requires_grad_()
    for _ in range(repeats):
        for name in names:
            run = prepare(layout, name)  # anew each time: it also says which kernels stand behind torch's operators
            times[name]["forward"].append(per_call(partial(without_graph, run, qkv), qkv.device))
            times[name]["forward_backward"].append(per_call(partial(with_backward, run, leaf, d_out), qkv.device))
    return times


def without_graph(run: Attention, qkv: Tensor) -> Tensor:
    with torch.no_grad():
        return run(qkv)


def with_backward(run: Attention, leaf: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output and the gradient of queries, keys and values."""
    out = run(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, d_out)[0]


def per_call(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call, warm: of its kernels on a GPU, else CPU time of this thread."""

    def seconds(calls: int) -> float:
        if device.type == "cuda":
            return seconds_of(action, device, calls)
        start = time.thread_time()
        for _ in range(calls):
            action()
        return (time.thread_time() - start) / calls

    seconds(1)
    return seconds(max(1, round(TIMED_SECONDS / max(seconds(1), 1e-6))))


def errors_of(
    names: list[str], layout: AttentionLayout, shape: Shape, qkv: Tensor, d_out: Tensor
) -> dict[str, dict[str, float]]:
    """Return each backend's relative error of output and gradient to the dense mask in float64, where that fits."""
    if shape.cells * shape.heads * shape.tokens**2 > MOST_LOGITS:
        return {}
    exact = with_backward(prepare(layout, DENSE), qkv.double().requires_grad_(), d_out.double())
    errors = {}
    for name in names:
        found = with_backward(prepare(layout, name), qkv.clone().requires_grad_(), d_out)
        off = [float((mine.double() - right).norm() / right.norm()) for mine, right in zip(found, exact, strict=True)]
        errors[name] = {"error": significant(off[0], 3), "gradient_error": significant(off[1], 3)}
    return errors
