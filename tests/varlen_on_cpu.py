"""What the CUDA varlen kernels compute, for CPU tensors: with it the code around them is tested where no GPU is.

Gradients of rows that no sequence covers stay NaN, as the kernels leave uninitialised memory there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scfm.model.attention import varlen_attention, varlen_attention_backward
from scfm.model.attention_cpu import exact


def sequences(cu_q: Tensor, cu_k: Tensor, longest: int) -> list[tuple[slice, slice]]:
    q, k = cu_q.tolist(), cu_k.tolist()
    assert max(int(cu.diff().max()) for cu in (cu_q, cu_k)) <= longest
    assert cu_q.dtype == cu_k.dtype == torch.int32
    return [(slice(a, b), slice(c, d)) for a, b, c, d in zip(q, q[1:], k, k[1:], strict=False)]


@varlen_attention.register_kernel("cpu")
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest: int, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    out = torch.full_like(q, torch.nan, memory_format=torch.contiguous_format)
    q, k, v = (x.to(exact(x.dtype)) for x in (q, k, v))
    lse = q.new_full((q.shape[1], len(q)), torch.nan)
    for rows, keys in sequences(cu_q, cu_k, longest):
        logits = torch.einsum("qhd,khd->hqk", q[rows], k[keys]) * scale
        lse[:, rows] = logits.logsumexp(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v[keys]).to(out.dtype)
    return out, lse


@varlen_attention_backward.register_kernel("cpu")
def _(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    longest: int, scale: float, kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.full_like(x, torch.nan, memory_format=torch.contiguous_format) for x in (q, k, v))
    d_out, q, k, v, out = (x.to(exact(x.dtype)) for x in (d_out, q, k, v, out))
    delta = (d_out * out).sum(-1).t()  # (H, T)
    for rows, keys in sequences(cu_q, cu_k, longest):
        p = (torch.einsum("qhd,khd->hqk", q[rows], k[keys]) * scale - lse[:, rows, None]).exp()
        ds = p * (torch.einsum("qhd,khd->hqk", d_out[rows], v[keys]) - delta[:, rows, None]) * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", ds, k[keys]).to(dq.dtype)
        dk[keys] = torch.einsum("hqk,qhd->khd", ds, q[rows]).to(dk.dtype)
        dv[keys] = torch.einsum("hqk,qhd->khd", p, d_out[rows]).to(dv.dtype)
    return dq, dk, dv
