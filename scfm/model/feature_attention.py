"""Attention through features, in blocks whose features stay in the cache and are computed again in the backward.

With features phi = E + eps and a column of ones beside the values, [v, 1], the forward and the backward are three kinds
of products, the same ones for queries and for keys:

    gather   sum_i phi_i^T a_i = E^T A + eps sum_i a_i        of keys: [v, 1];     backward, of queries: [g, -delta]
    read     phi_i B           = E B + eps sum_f B_f          by queries: [S, z];  backward, by keys: dS
    pull     d phi             = A B^T

    forward    [S, z] = gather(keys, [v, 1]);   [numerator, n] = read(queries, [S, z]);   out = numerator / n
    backward   g = d_out / n;   delta = <g, out>
               d [S, z] = gather(queries, [g, -delta]);   d phi_q = [g, -delta] [S, z]^T
               dv = read(keys, dS);                       d phi_k = [v, 1] d [S, z]^T

So eps costs no pass over the features. The keys' stabiliser is a running maximum, as in flash attention: a larger one
rescales what was gathered before it. The backward knows the stabilisers; it adds what a row has in its exponent beside
w y inside the projection's product, as one more column.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from scfm.model.attention_cpu import Run, exact, runs_of
from scfm.model.features import FeatureMap, Gathered, KeyPass, blocks, read, taken, times, values_of, with_column


def cell_runs(cu_seqlens: Tensor, longest: int, n_tokens: int) -> list[Run]:
    """Return neighbouring cells of one length, to be computed together; equal cells need no look at the device."""
    n_cells = len(cu_seqlens) - 1
    if longest * n_cells == n_tokens:
        return [Run(0, n_cells, longest, longest)]
    return runs_of(cu_seqlens, cu_seqlens.diff())


@custom_op("scfm::feature_attention", mutates_args=())
def _feature_attention(
    qkv: Tensor,
    projection: Tensor,
    cu_seqlens: Tensor,
    key_mask: Tensor | None,
    longest: int,
    kernel: str,
    compat: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output (T, H, d), and for the backward normalisers, rows, sums and the place of the largest w y.

    rows (T, 2, H) is what the exponents of a query and of a key hold beside w y; sums (N, H, d + 1, m) is [S, z].
    """
    dtype, (n_tokens, _, n_heads, d) = exact(qkv.dtype), qkv.shape
    phi = FeatureMap.of(kernel, projection, compat, dtype)
    layout = cell_runs(cu_seqlens, longest, n_tokens), n_heads, phi.m, qkv.device
    q, k, v = qkv.unbind(1)
    keys = KeyPass(phi, k, len(cu_seqlens) - 1, d + 1)
    out, rows = torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(keys.norms)
    normaliser = torch.empty_like(rows)
    with torch.autocast(qkv.device.type, enabled=False):
        for block in blocks(*layout):
            kept = taken(block, key_mask, n_heads)
            values = values_of(block, v, kept, compat)
            keys.add(block, block.take(k, dtype), values, None if compat else kept)
        sums, key_rows, largest = keys.finish(layout[0])
        for block in blocks(*layout):
            e, row = phi.of_queries(block.take(q, dtype))
            found = read(e, block.of_cells(sums).flatten(0, 1), phi.eps[0])
            block.put(out, found[..., :-1] / found[..., -1:])
            block.put(normaliser, found[..., -1])
            block.put(rows, row)
    return out, normaliser, torch.stack([rows, key_rows], 1), sums, largest


@custom_op("scfm::feature_attention_backward", mutates_args=())
def _feature_attention_backward(
    d_out: Tensor,
    qkv: Tensor,
    projection: Tensor,
    cu_seqlens: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    normaliser: Tensor,
    rows: Tensor,
    sums: Tensor,
    largest: Tensor,
    longest: int,
    kernel: str,
    compat: bool,
) -> Tensor:
    """Return the gradient of queries, keys and values, (T, 3, H, d)."""
    dtype, (n_tokens, _, n_heads, d) = exact(qkv.dtype), qkv.shape
    phi = FeatureMap.of(kernel, projection, compat, dtype)
    layout = cell_runs(cu_seqlens, longest, n_tokens), n_heads, phi.m, qkv.device
    q, k, v = qkv.unbind(1)
    d_qkv = torch.empty_like(qkv)
    gathered = Gathered(sums, len(cu_seqlens) - 1, n_heads, d + 1, phi.m)
    through_peak = sums.new_zeros(())
    with torch.autocast(qkv.device.type, enabled=False):
        for block in blocks(*layout):
            x = block.take(q, dtype)
            p, e = phi.again(x, block.take(rows[:, 0], dtype))
            g = block.take(d_out, dtype) / block.take(normaliser, dtype).unsqueeze(-1)
            pull = with_column(g, -(g * block.take(out, dtype)).sum(-1))
            gathered.add(block, e, pull)
            top = e.argmax(-1) if phi.moving_peaks else None
            d_p = phi.pulled(p, e, times(pull, block.of_cells(sums).flatten(0, 1).mT))
            d_x = phi.unprojected(d_p)
            if top is not None:
                d_x -= d_p.sum(-1, keepdim=True) * (phi.norm_gradient(x) + phi.weight[top])
            block.put(d_qkv[:, 0], d_x)
        d_sums = gathered.with_eps(phi.eps[0])
        for block in blocks(*layout):
            x, kept = block.take(k, dtype), taken(block, key_mask, n_heads)
            p, e = phi.again(x, block.take(rows[:, 1], dtype))
            d_sum = block.of_cells(d_sums).flatten(0, 1)
            d_v = read(e, d_sum[:, :-1], phi.eps[1])
            block.put(d_qkv[:, 2], d_v if kept is None else d_v * kept.unsqueeze(-1))
            d_p = phi.pulled(p, e, times(values_of(block, v, kept, compat), d_sum.mT))
            d_x = phi.unprojected(d_p)
            if kernel == "exp":
                d_row = d_p.sum(-1, keepdim=True)
                d_x -= d_row * phi.norm_gradient(x)
                through_peak += d_row.sum()
            block.put(d_qkv[:, 1], d_x)
        if phi.moving_peaks:
            place = largest // n_heads, largest % n_heads
            x = k[place].to(dtype)
            d_qkv[:, 1][place] -= through_peak * phi.weight[(phi.weight @ x).argmax()]
    return d_qkv


@_feature_attention.register_fake
def _(qkv: Tensor, projection: Tensor, cu_seqlens: Tensor, *_: Any) -> tuple[Tensor, ...]:
    n_tokens, _parts, n_heads, d = qkv.shape
    m = projection.shape[0] or d
    normaliser = qkv.new_empty((n_tokens, n_heads), dtype=exact(qkv.dtype))
    sums = normaliser.new_empty((cu_seqlens.shape[0] - 1, n_heads, d + 1, m))
    rows = normaliser.new_empty((n_tokens, 2, n_heads))
    return qkv.new_empty((n_tokens, n_heads, d)), normaliser, rows, sums, cu_seqlens.new_empty((), dtype=torch.int64)


@_feature_attention_backward.register_fake
def _(d_out: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(qkv)


class _FeatureAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        projection: Tensor,
        cu_seqlens: Tensor,
        key_mask: Tensor | None,
        longest: int,
        kernel: str,
        compat: bool,
    ) -> Tensor:
        given, constants = (qkv, projection, cu_seqlens, key_mask), (longest, kernel, compat)
        out, *kept = torch.ops.scfm.feature_attention(*given, *constants)
        ctx.save_for_backward(*given, out, *kept)
        ctx.constants = constants
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_qkv = torch.ops.scfm.feature_attention_backward(grads[0], *ctx.saved_tensors, *ctx.constants)
        return d_qkv, None, None, None, None, None, None


def feature_attention(
    qkv: Tensor,
    projection: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    kernel: str,
    compat: bool = False,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attend within cells through features: (T, 3, H, d) -> (T, H, d).

    Args:
        qkv: (T, 3, H, d) queries, keys and values.
        projection: (m, d) random directions; (0, d) for elu.
        cu_seqlens: (N + 1,) int32 cell boundaries.
        longest: no cell has more tokens.
        kernel: exp, relu or elu.
        compat: as scBERT's release.
        key_mask: (T,) bool, False for a masked key.
    """
    return _FeatureAttention.apply(qkv, projection, cu_seqlens, key_mask, longest, kernel, compat)


@torch.no_grad()
def feature_scores(
    qkv: Tensor, projection: Tensor, cu_seqlens: Tensor, longest: int, kernel: str, compat: bool
) -> Tensor:
    """Return (T,) the column sums of the attention matrix of each cell over its queries, mean over heads.

    sum_i phi(q_i) / n_i is one vector of m; a key's score is its product with the key's features.
    """
    dtype, n_tokens, n_heads = exact(qkv.dtype), len(qkv), qkv.shape[2]
    phi = FeatureMap.of(kernel, projection, compat, dtype)
    layout = cell_runs(cu_seqlens, longest, n_tokens), n_heads, phi.m, qkv.device
    q, k, _ = qkv.unbind(1)
    keys = KeyPass(phi, k, len(cu_seqlens) - 1, 1)
    asked = Gathered(keys.norms, len(cu_seqlens) - 1, n_heads, 1, phi.m)
    scores = torch.empty_like(keys.norms)
    with torch.autocast(qkv.device.type, enabled=False):
        for block in blocks(*layout):
            x = block.take(k, dtype)
            keys.add(block, x, x.new_ones(*x.shape[:2], 1), None)
        sums, rows, _ = keys.finish(layout[0])
        for block in blocks(*layout):
            e, _ = phi.of_queries(block.take(q, dtype))
            asked.add(block, e, 1 / read(e, block.of_cells(sums).flatten(0, 1), phi.eps[0]))
        mean_query = asked.with_eps(phi.eps[0])
        for block in blocks(*layout):
            _, e = phi.again(block.take(k, dtype), block.take(rows, dtype))
            block.put(scores, read(e, block.of_cells(mean_query).flatten(0, 1), phi.eps[1]))
    lengths = cu_seqlens.diff()
    return scores.mean(1) / torch.repeat_interleave(lengths, lengths, output_size=n_tokens)


@register_flop_formula(torch.ops.scfm.feature_attention, get_raw=True)
def _(qkv: Tensor, projection: Tensor, *_: Any, **__: Any) -> int:
    n_tokens, _parts, n_heads, d = qkv.shape
    return n_tokens * n_heads * d * (8 * projection.shape[0] or 4 * d)


@register_flop_formula(torch.ops.scfm.feature_attention_backward, get_raw=True)
def _(d_out: Tensor, qkv: Tensor, projection: Tensor, *_: Any, **__: Any) -> int:
    n_tokens, _parts, n_heads, d = qkv.shape
    return n_tokens * n_heads * d * (16 * projection.shape[0] or 8 * d)
