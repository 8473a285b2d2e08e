"""What a device can do at most: the rate of large matrix products, measured on it, against which MFU is stated."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from scfm.model.layers import Linear


def product_type(precision: str | int) -> torch.dtype:
    """Return the type of matrix products under a `trainer.precision`."""
    if str(precision).startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if str(precision).startswith("16") else torch.float32


def matmul_ceiling(
    device: torch.device | str, dtype: torch.dtype, size: int | None = None, seconds: float = 0.1
) -> float:
    """Return the median FLOP/s of square matrix products on a device, with scfm's own kernels.

    Args:
        device: where.
        dtype: of the matrices.
        size: of their sides; 8192 on a GPU and 1024 elsewhere unless given.
        seconds: how long to measure, after one product that warms up; at least three times.
    """
    device = torch.device(device)
    size = size or (8192 if device.type == "cuda" else 1024)
    in_a_row = 10 if device.type == "cuda" else 1
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        layer = Linear(size, size, bias=False, device=device, dtype=dtype)
        x = torch.randn(size, size, device=device, dtype=dtype)
    taken: list[float] = []
    end = time.perf_counter() + seconds
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        layer(x)
        while len(taken) < 3 or time.perf_counter() < end:
            taken.append(seconds_of(lambda: layer(x), device, in_a_row))
    return 2 * size**3 / median(taken)


def seconds_of(action: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Return the seconds per call of calls in a row, on a GPU those of its kernels.

    An idle GPU also waits for the host to launch the first of them: of one call of a millisecond that is percents.
    """

    def repeated() -> None:
        for _ in range(calls):
            action()

    if device.type != "cuda":
        start = time.perf_counter()
        repeated()
        return (time.perf_counter() - start) / calls
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    repeated()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000 / calls
