"""One encoder block on packed tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scfm.model.attention import Attention
from scfm.model.layers import Dropout, LayerNorm, Linear
from scfm.recipe import ModelConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class Block(nn.Module):
    """Self-attention and a feed-forward layer, each with dropout, a residual and a layer norm: (T, D) -> (T, D).

    `post` norms the sum of residual and branch (Vaswani et al. 2017). `pre` is scGPT's own variant: x = norm(x);
    x = x + branch(x), so that the residual carries the normed input. scGPT's published weights expect that unknown
    genes bypass the attention's output projection (`unknown_output_projection: false`).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.post = config.norm == "post"
        self.activation = ACTIVATIONS[config.activation]
        self.bypass = config.attention == "generative" and not config.unknown_output_projection
        self.qkv = Linear(width, 3 * width)
        self.out_proj = Linear(width, width)
        self.norm1 = LayerNorm(width)
        self.linear1 = Linear(width, config.hidden)
        self.linear2 = Linear(config.hidden, width)
        self.norm2 = LayerNorm(width)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, attention: Attention, unknown: Tensor) -> Tensor:
        if self.post:
            x = self.norm1(self.dropout(self.attend(x, attention, unknown), residual=x))
            return self.norm2(self.dropout(self.feed_forward(x), residual=x))
        x = self.norm1(x)
        x = self.norm2(self.dropout(self.attend(x, attention, unknown), residual=x))
        return self.dropout(self.feed_forward(x), residual=x)

    def attend(self, x: Tensor, attention: Attention, unknown: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (T, 3, H, d)
        context = attention(qkv).flatten(1)  # (T, D)
        projected = self.out_proj(context)
        return torch.where(unknown[:, None], context, projected) if self.bypass else projected

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


def run_blocks(blocks: nn.ModuleList, x: Tensor, *given: Any, recompute: bool) -> Tensor:
    """Pass x through blocks, which also take what is given; with `recompute` the backward computes each block again."""
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, x, *given, use_reentrant=False)
        else:
            x = block(x, *given)
    return x
