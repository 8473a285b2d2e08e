"""Linear and dropout as torch defines them, with faster CPU kernels where torch's own are slow."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from scfm.errors import ScfmError

LANES = 2**16
# oneDNN keeps a compiled product per shape, 1,024 of them: with packs of ever new lengths a gigabyte, none used again
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
onednn: Any = torch.ops.mkldnn._linear_pointwise if torch.backends.mkldnn.is_available() else None


class Linear(nn.Linear):
    """A linear layer whose float32 products on a CPU run in oneDNN; all else is torch's own linear layer.

    One with bf16 weights takes its input in bf16, so that the stream between layers may be float32.

    torch computes float32 products in MKL, whose kernels reach less than half of oneDNN's speed on AMD processors.
    Compiled code keeps torch's own, which Inductor knows.
    """

    def forward(self, input: Tensor) -> Tensor:
        exact = input.dtype == self.weight.dtype == torch.float32
        usable = onednn is not None and input.device.type == "cpu" and input.numel() > 0 and not is_compiling()
        if exact and usable and not torch.is_autocast_enabled("cpu"):
            return _OneDNNLinear.apply(input, self.weight, self.bias)
        if self.weight.dtype == torch.bfloat16:
            input = input.to(torch.bfloat16)
        return super().forward(input)


class _OneDNNLinear(torch.autograd.Function):
    """(T, in) -> (T, out) in float32, forward and backward in oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()  # oneDNN is very slow on other strides than plain and transposed ones
        ctx.save_for_backward(x, weight)
        return onednn(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            onednn(grad, weight.t(), None, "none", [], "") if need_x else None,
            onednn(x.t(), grad.t(), None, "none", [], "").t() if need_weight else None,
            grad.sum(0) if need_bias else None,
        )


class LayerNorm(nn.LayerNorm):
    """A layer norm that also takes weights of less precision than its input: FSDP gathers blocks in bf16."""

    def forward(self, input: Tensor) -> Tensor:
        kind = torch.promote_types(input.dtype, self.weight.dtype)
        return F.layer_norm(input, self.normalized_shape, self.weight.to(kind), self.bias.to(kind), self.eps)


class Dropout(nn.Module):
    """Dropout, optionally added to a residual: residual + dropout(x).

    On a CPU torch draws one Bernoulli number per element, which costs more than the matrix products around it. Here 16
    random bits decide per element, four elements to a 64-bit draw: the probability is rounded to 1/65536, and the kept
    values are scaled by the rounded probability, so that the expectation is exact.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ScfmError(f"model.dropout: {p} must lie in [0, 1)")
        self.p = p

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self.training or self.p == 0:
            return x if residual is None else residual + x
        if x.device.type != "cpu" or is_compiling():
            dropped = F.dropout(x, self.p)
            return dropped if residual is None else residual + dropped
        mask = keep_mask(x, self.p)
        return x * mask if residual is None else torch.addcmul(residual, x, mask)


def keep_mask(x: Tensor, p: float) -> Tensor:
    """Draw the factor of each element of a dropout on a CPU: 0 with probability p, else 1 / (1 - p)."""
    dropped = round(p * LANES)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - LANES // 2
    return kept.to(x.dtype).mul_(LANES / (LANES - dropped))
