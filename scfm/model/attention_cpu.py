"""Attention kernels for the CPU, as custom operators; `scfm.model.attention` has the rule and chooses.

`cell_attention` runs torch's flash kernels cell by cell, in any type, and merges the self keys in. `block_attention` is
for bf16 on CPUs that multiply it natively: plain products and softmaxes of blocks of logits that stay in the cache are
two to three times faster there than the flash kernels, and round the logits to bf16 as any attention written in bf16
does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

aten = torch.ops.aten
LOGITS_PER_BLOCK = 2**20  # 2 MB in bf16; measured from 2**17 to 2**21


def merge(v: Tensor, o: Tensor, lse: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add a self key of logit s to attention over other keys; return output, log-sum-exp and the self key's weight."""
    total = torch.logaddexp(lse, s)
    p = (s - total).exp()
    return o * (lse - total).exp().unsqueeze(-1) + p.unsqueeze(-1) * v, total, p


def self_logit(q: Tensor, k: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return (q.to(dtype) * k).sum(-1) * scale


def self_gradient(qkv: tuple[Tensor, ...], o: Tensor, p: Tensor, d_o: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Return what the self key, of weight p, adds to the gradients of q, k and v."""
    q, k, v = qkv
    d_o, p = d_o.to(p.dtype), p.unsqueeze(-1)
    ds = (d_o * v - d_o * o).sum(-1, keepdim=True) * p * scale
    return ds * k, ds * q, p * d_o


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


def exact(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which softmax statistics are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@custom_op("scfm::cell_attention", mutates_args=(), device_types="cpu")
def _cell_attention(
    qkv: Tensor, cu_seqlens: Tensor, n_keys: Tensor, self_key: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (T, H, d), the log-sum-exp (T, H) and the self keys' weights (T, H; on unknown rows only)."""
    out = qkv.new_empty(len(qkv), *qkv.shape[2:])  # (T, H, d)
    lse = qkv.new_empty(out.shape[:2], dtype=exact(qkv.dtype))  # (T, H)
    p_self = torch.empty_like(lse)
    for run in runs_of(cu_seqlens, n_keys):
        q, k, v = (run.heads_first(x) for x in qkv.unbind(1))  # (cells, H, length, d)
        m = run.keys
        o, total = aten._scaled_dot_product_flash_attention_for_cpu(q, k[:, :, :m], v[:, :, :m], scale=scale)
        if self_key and m < run.length:
            own = q[:, :, m:], k[:, :, m:], v[:, :, m:]
            s = self_logit(own[0], own[1], scale, lse.dtype)
            o[:, :, m:], total[:, :, m:], p = merge(own[2], o[:, :, m:], total[:, :, m:], s)
            run.heads_first(p_self)[:, :, m:] = p
        run.heads_first(out).copy_(o)
        run.heads_first(lse).copy_(total)
    return out, lse, p_self


@custom_op("scfm::cell_attention_backward", mutates_args=(), device_types="cpu")
def _cell_attention_backward(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    p_self: Tensor,
    cu_seqlens: Tensor,
    n_keys: Tensor,
    self_key: bool,
    scale: float,
) -> Tensor:
    """Return the gradient of queries, keys and values, (T, 3, H, d)."""
    d_out, d_qkv = d_out.contiguous(), torch.empty_like(qkv)
    for run in runs_of(cu_seqlens, n_keys):
        q, k, v = (run.heads_first(x) for x in qkv.unbind(1))  # (cells, H, length, d)
        dq, dk, dv = (run.heads_first(x) for x in d_qkv.unbind(1))
        do, o, m = run.heads_first(d_out), run.heads_first(out), run.keys
        known = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k[:, :, :m], v[:, :, :m], o, run.heads_first(lse), 0.0, False, scale=scale
        )
        for mine, theirs in zip((dq, dk[:, :, :m], dv[:, :, :m]), known, strict=True):
            mine.copy_(theirs)
        if self_key and m < run.length:
            own = q[:, :, m:], k[:, :, m:], v[:, :, m:]
            added = self_gradient(own, o[:, :, m:], run.heads_first(p_self)[:, :, m:], do[:, :, m:], scale)
            dq[:, :, m:] += added[0]
            dk[:, :, m:], dv[:, :, m:] = added[1:]
        else:
            dk[:, :, m:], dv[:, :, m:] = 0, 0
    return d_qkv


@_cell_attention.register_fake
def _(qkv: Tensor, cu_seqlens: Tensor, n_keys: Tensor, self_key: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    statistics = qkv.new_empty((qkv.shape[0], qkv.shape[2]), dtype=exact(qkv.dtype))
    return qkv.new_empty(qkv.shape[0], *qkv.shape[2:]), statistics, torch.empty_like(statistics)


@_cell_attention_backward.register_fake
def _(d_out: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(qkv)


class _CellAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu_seqlens: Tensor, n_keys: Tensor, self_key: bool, scale: float) -> Tensor:
        out, lse, p_self = torch.ops.scfm.cell_attention(qkv, cu_seqlens, n_keys, self_key, scale)
        ctx.save_for_backward(qkv, out, lse, p_self, cu_seqlens, n_keys)
        ctx.self_key, ctx.scale = self_key, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_qkv = torch.ops.scfm.cell_attention_backward(grads[0], *ctx.saved_tensors, ctx.self_key, ctx.scale)
        return d_qkv, None, None, None, None


def cell_attention(qkv: Tensor, cu_seqlens: Tensor, n_keys: Tensor, self_key: bool, scale: float) -> Tensor:
    """Attend cell by cell in torch's flash kernels, self keys merged in; (T, 3, H, d) -> (T, H, d)."""
    return _CellAttention.apply(qkv, cu_seqlens, n_keys, self_key, scale)


@dataclass(frozen=True)
class Heads:
    """The heads of a run, each a matrix, and its visible keys; the self key takes one more column of the logits.

    That column comes from a zero key (B, m + 1, d), and is overwritten with the self logits: -inf on visible rows.
    """

    q: Tensor  # (B, n, d)
    k: Tensor
    v: Tensor
    keys: Tensor  # (B, m or m + 1, d)
    values: Tensor
    self_logits: Tensor | None  # (B, n)
    scale: float

    @classmethod
    def of(cls, qkv: Tensor, run: Run, self_key: bool, scale: float) -> Heads:
        q, k, v = (run.heads_first(x).flatten(0, 1) for x in qkv.unbind(1))
        m = run.keys
        if not self_key or m == run.length:
            return cls(q, k, v, k[:, :m], v[:, :m], None, scale)
        keys, values = k[:, : m + 1].clone(), v[:, : m + 1].clone()
        keys[:, m], values[:, m] = 0, 0
        logits = q.new_full(q.shape[:2], -torch.inf)
        logits[:, m:] = self_logit(q[:, m:], k[:, m:], scale, exact(q.dtype))
        return cls(q, k, v, keys, values, logits, scale)

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Yield heads and rows whose logits stay in the cache together."""
        (n_heads, n_rows), n_keys = self.q.shape[:2], self.keys.shape[1]
        heads = max(LOGITS_PER_BLOCK // (n_rows * n_keys), 1)
        rows = n_rows if n_rows * n_keys <= 4 * LOGITS_PER_BLOCK else max(LOGITS_PER_BLOCK // n_keys, 1)
        for head in range(0, n_heads, heads):
            for row in range(0, n_rows, rows):
                yield slice(head, head + heads), slice(row, row + rows)

    def weights(self, heads: slice, rows: slice) -> Tensor:
        """Return the softmax of a block, (heads, rows, keys)."""
        q, k = self.q[heads, rows], self.keys[heads].mT
        logits = torch.baddbmm(q.new_empty(1), q, k, beta=0, alpha=self.scale)  # scaled before they are rounded
        if self.self_logits is not None:
            logits[..., -1] = self.self_logits[heads, rows]
        return logits.softmax(-1)


@custom_op("scfm::block_attention", mutates_args=(), device_types="cpu")
def _block_attention(qkv: Tensor, cu_seqlens: Tensor, n_keys: Tensor, self_key: bool, scale: float) -> Tensor:
    """Return the output, (T, H, d)."""
    out = qkv.new_empty(len(qkv), *qkv.shape[2:])
    for run in runs_of(cu_seqlens, n_keys):
        heads = Heads.of(qkv, run, self_key, scale)
        found = torch.empty_like(heads.q)
        for block in heads.blocks():
            p = heads.weights(*block)
            found[block] = p @ heads.values[block[0]]
            if heads.self_logits is not None:
                found[block] += p[..., -1:] * heads.v[block]
        run.heads_first(out).copy_(found.unflatten(0, (run.cells, -1)))
    return out


@custom_op("scfm::block_attention_backward", mutates_args=(), device_types="cpu")
def _block_attention_backward(
    d_out: Tensor, qkv: Tensor, cu_seqlens: Tensor, n_keys: Tensor, self_key: bool, scale: float
) -> Tensor:
    """Return the gradient of queries, keys and values, (T, 3, H, d); the weights are computed again."""
    d_qkv = torch.empty_like(qkv)
    for run in runs_of(cu_seqlens, n_keys):
        heads, m = Heads.of(qkv, run, self_key, scale), run.keys
        do = run.heads_first(d_out).flatten(0, 1)
        dq, dk, dv = torch.empty_like(heads.q), torch.zeros_like(heads.k), torch.zeros_like(heads.v)
        d_keys, d_values = (torch.zeros_like(x, dtype=exact(x.dtype)) for x in (heads.keys, heads.values))
        for block in heads.blocks():
            p, of = heads.weights(*block), block[0]
            d_p = do[block] @ heads.values[of].mT
            if heads.self_logits is not None:
                d_p[..., -1] = (do[block].to(d_keys.dtype) * heads.v[block]).sum(-1)
            ds = aten._softmax_backward_data(d_p, p, -1, p.dtype)
            dq[block] = ds @ heads.keys[of]
            # transposing the narrow factor: oneDNN reorders a transposed left one, which for p takes half of the time
            d_keys[of] += (heads.q[block].mT @ ds).mT
            d_values[of] += (do[block].mT @ p).mT
            if heads.self_logits is not None:
                dq[block] += ds[..., -1:] * heads.k[block]
                dk[block] = ds[..., -1:] * heads.q[block]
                dv[block] = p[..., -1:] * do[block]
        dk[:, :m], dv[:, :m] = d_keys[:, :m], d_values[:, :m]
        for whole, part in zip(d_qkv.unbind(1), (dq * scale, dk * scale, dv), strict=True):
            run.heads_first(whole).copy_(part.unflatten(0, (run.cells, -1)))
    return d_qkv


@_block_attention.register_fake
def _(qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(qkv.shape[0], *qkv.shape[2:])


@_block_attention_backward.register_fake
def _(d_out: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(qkv)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu_seqlens: Tensor, n_keys: Tensor, self_key: bool, scale: float) -> Tensor:
        ctx.save_for_backward(qkv, cu_seqlens, n_keys)
        ctx.self_key, ctx.scale = self_key, scale
        return torch.ops.scfm.block_attention(qkv, cu_seqlens, n_keys, self_key, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_qkv = torch.ops.scfm.block_attention_backward(grads[0], *ctx.saved_tensors, ctx.self_key, ctx.scale)
        return d_qkv, None, None, None, None


def block_attention(qkv: Tensor, cu_seqlens: Tensor, n_keys: Tensor, self_key: bool, scale: float) -> Tensor:
    """Attend cell by cell in products of cached blocks, for bf16; (T, 3, H, d) -> (T, H, d)."""
    return _BlockAttention.apply(qkv, cu_seqlens, n_keys, self_key, scale)


def pairs_of(n_tokens: int, queries: Tensor, keys: Tensor) -> int:
    """Return the query-key pairs of sequences; of fake tensors, as if they were equally long and all keys visible."""
    if isinstance(queries, FakeTensor) or queries.device.type == "meta":
        return n_tokens * -(-n_tokens // len(keys))
    return int((queries.long() * keys).sum())


@register_flop_formula([torch.ops.scfm.cell_attention, torch.ops.scfm.block_attention], get_raw=True)
def _(qkv: Tensor, cu: Tensor, n_keys: Tensor, *_: Any, **__: Any) -> int:
    return 4 * pairs_of(len(qkv), cu.diff(), n_keys) * qkv.shape[2] * qkv.shape[3]


@register_flop_formula(torch.ops.scfm.cell_attention_backward, get_raw=True)
def _(d: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, p: Tensor, cu: Tensor, n_keys: Tensor, *_: Any, **__: Any) -> int:
    return 10 * pairs_of(len(qkv), cu.diff(), n_keys) * qkv.shape[2] * qkv.shape[3]


@register_flop_formula(torch.ops.scfm.block_attention_backward, get_raw=True)
def _(d: Tensor, qkv: Tensor, cu: Tensor, n_keys: Tensor, *_: Any, **__: Any) -> int:
    return 10 * pairs_of(len(qkv), cu.diff(), n_keys) * qkv.shape[2] * qkv.shape[3]
