"""Attention of packed cells on a CPU: cells of one shape go together, and bf16 inference runs as matrix products.

torch's CPU flash kernel multiplies bf16 no faster than float32 where the CPU has no AMX (77 GFLOP/s on one core of an
EPYC with AVX512-BF16, whose oneDNN products reach 430). Two batched products with a softmax between them reach 200,
as long as the logits of a block of queries stay in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOGITS = 1_500_000  # of a block, per thread: 3 MB in bf16; measured from 0.5 to 12 million


@dataclass(frozen=True)
class Run:
    """Neighbouring cells of one length and one number of visible keys: one kernel call serves them all."""

    start: int
    cells: int
    length: int
    keys: int

    def heads_first(self, x: Tensor) -> Tensor:
        """View the run's rows of a packed tensor, (T, H, ...) -> (cells, H, length, ...)."""
        rows = x[self.start : self.start + self.cells * self.length]
        return rows.unflatten(0, (self.cells, self.length)).transpose(1, 2)

    def split(self, cells: int) -> list[Run]:
        """Return the run in parts of at most so many cells."""
        firsts = range(0, self.cells, cells)
        return [Run(self.start + i * self.length, min(cells, self.cells - i), self.length, self.keys) for i in firsts]


def runs_of(cu_seqlens: Tensor, n_keys: Tensor) -> list[Run]:
    """Return the runs of a pack, in order."""
    runs: list[Run] = []
    bounds = cu_seqlens.tolist()
    for start, stop, keys in zip(bounds, bounds[1:], n_keys.tolist(), strict=False):
        last = runs[-1] if runs else None
        if last and (last.length, last.keys) == (stop - start, keys):
            runs[-1] = Run(last.start, last.cells + 1, last.length, keys)
        else:
            runs.append(Run(start, 1, stop - start, keys))
    return runs


def attend_by_products(qkv: Tensor, runs: list[Run], scale: float) -> Tensor:
    """Attend from every token to the visible keys of its cell, (T, 3, H, d) -> (T, H, d), without a gradient.

    Logits and weights are rounded to the type of `qkv`; products and the softmax's sums are kept in float32.
    """
    out = qkv.new_empty(len(qkv), *qkv.shape[2:])  # (T, H, d)
    for run in runs:
        queries = max(1, LOGITS * torch.get_num_threads() // (qkv.shape[2] * run.keys))  # a block's
        for part in run.split(max(1, queries // run.length)):
            # strided operands cost a third of the speed
            q, k, v = (part.heads_first(x).flatten(0, 1).contiguous() for x in qkv.unbind(1))  # (cells * H, length, d)
            k, v = k[:, : run.keys].transpose(1, 2), v[:, : run.keys]
            target = part.heads_first(out)  # (cells, H, length, d)
            for first in range(0, run.length, queries):
                block = slice(first, first + queries)
                logits = torch.baddbmm(q.new_empty(1), q[:, block], k, beta=0, alpha=scale)
                target[:, :, block] = torch.bmm(logits.softmax(-1), v).unflatten(0, (part.cells, -1))
    return out
