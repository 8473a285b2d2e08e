"""Float32 products and attention on CPUs through oneDNN, where torch's own run at half speed.

torch computes float32 products in MKL, whose kernels reach less than half of oneDNN's speed on AMD processors, and
torch's flash attention is made of such products. The attention here works one head and one block of queries at a time,
so that the weights stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

kernel: Any = torch.ops.mkldnn._linear_pointwise if torch.backends.mkldnn.is_available() else None
BLOCK = 512  # queries at a time


def usable(x: Tensor) -> bool:
    """Whether oneDNN computes products of such a tensor: float32 on a CPU, not empty, and torch was built with oneDNN."""
    return kernel is not None and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias; x and weight must be contiguous or transposed, other strides are very slow."""
    return kernel(x, weight, bias, "none", [], "")


def blocks(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, rows)) for start in range(0, rows, BLOCK))


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, lse: Tensor) -> None:
    """Write softmax attention of q (cells, H, n, d) over k and v (cells, H, m, d) to `out`, log-sum-exp to `lse`."""
    for cell, head in product(range(q.shape[0]), range(q.shape[1])):
        keys, values_t = (k[cell, head] * scale).contiguous(), v[cell, head].t().contiguous()
        for rows in blocks(q.shape[2]):
            logits = linear(q[cell, head, rows].contiguous(), keys)  # (n, m)
            weights = logits.softmax(-1)
            out[cell, head, rows] = linear(weights, values_t)
            # the largest weight is exp(largest logit - lse), and never underflows
            lse[cell, head, rows] = logits.amax(-1) - weights.amax(-1).log()


def attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, share: Tensor, scale: float, grads: tuple[Tensor, ...]
) -> None:
    """Write the gradients of q, k and v to `grads`.

    `share` (cells, H, n) is the part of each query's softmax that lies on these keys: below 1 where `out` also holds
    keys merged in from elsewhere. Their weights are the softmax over these keys times the share.
    """
    dq, dk, dv = grads
    for cell, head in product(range(q.shape[0]), range(q.shape[1])):
        keys, values = (k[cell, head] * scale).contiguous(), v[cell, head].contiguous()
        keys_t = keys.t().contiguous()
        dk_t, dv_t = torch.zeros_like(keys_t), torch.zeros_like(keys_t)  # (d, m)
        for rows in blocks(q.shape[2]):
            queries = q[cell, head, rows].contiguous()
            shared = (d_out[cell, head, rows] * share[cell, head, rows, None]).contiguous()  # (n, d)
            weights = linear(queries, keys).softmax(-1)  # (n, m)
            delta = (shared * out[cell, head, rows]).sum(-1, keepdim=True)
            d_logits = linear(shared, values).sub_(delta).mul_(weights)
            dq[cell, head, rows] = linear(d_logits, keys_t)
            dk_t += linear(queries.t().contiguous(), d_logits.t())
            dv_t += linear(shared.t().contiguous(), weights.t())
        dk[cell, head] = dk_t.t() * scale
        dv[cell, head] = dv_t.t()
