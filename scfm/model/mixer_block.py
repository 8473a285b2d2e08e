"""One block of scBERT on packed tokens: a mixer and a feed-forward layer, normed before."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfm.model.layers import Dropout, LayerNorm, Linear
from scfm.model.performer import Segments, build_mixer
from scfm.recipe import ModelConfig

REZERO_START = 1e-3


class ScaleNorm(nn.Module):
    """g x / |x|: one learned length for all tokens (Nguyen and Salazar, IWSLT 2019): (T, D) -> (T, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.full((1,), math.sqrt(width)))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1, eps=1e-5) * self.g


class ReZero(nn.Module):
    """g y of a branch's output y, in place of a norm of its input (Bachlechner et al., UAI 2021): (T, D) -> (T, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.full((1,), REZERO_START))

    def forward(self, branch: Tensor) -> Tensor:
        return branch * self.g


def branch_norm(kind: str, width: int) -> nn.Module:
    """Build what `model.performer.norm` names for one branch."""
    if kind == "rezero":
        return ReZero()
    return ScaleNorm(width) if kind == "scale" else LayerNorm(width)


class MixerBlock(nn.Module):
    """x = x + attend(x); x = x + feed_forward(x): (T, D) -> (T, D).

    Reversible (Kitaev et al., ICLR 2020) it takes two streams, (2, T, D) -> (2, T, D): the first gains attend of the
    second, the second then feed_forward of the first.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        form, width = config.performer, config.width
        inner = config.heads * form.head_width
        self.heads, self.reversible, self.glu = config.heads, form.reversible, form.glu
        self.rezero = form.norm == "rezero"
        self.attention_norm = branch_norm(form.norm, width)
        self.qkv = Linear(width, 3 * inner, bias=form.qkv_bias)
        self.mixer = build_mixer(config)
        self.out_proj = Linear(inner, width)
        self.feed_forward_norm = branch_norm(form.norm, width)
        self.linear1 = Linear(width, 2 * config.hidden if form.glu else config.hidden)
        self.linear2 = Linear(config.hidden, width)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, segments: Segments, key_mask: Tensor | None = None) -> Tensor:
        first, second = x if self.reversible else (x, x)
        first = self.dropout(self.attend(second, segments, key_mask), residual=first)
        second = self.dropout(self.feed_forward(first), residual=second if self.reversible else first)
        return torch.stack([first, second]) if self.reversible else second

    def attend(self, x: Tensor, segments: Segments, key_mask: Tensor | None = None) -> Tensor:
        """Return what reading the other genes adds, (T, D) -> (T, D)."""
        mixed = self.mixer(self.queries(x), segments, key_mask)  # (T, H, d)
        branch = self.out_proj(mixed.flatten(1))
        return self.attention_norm(branch) if self.rezero else branch

    def queries(self, x: Tensor) -> Tensor:
        """Return queries, keys and values, (T, D) -> (T, 3, H, d)."""
        x = x if self.rezero else self.attention_norm(x)
        return self.qkv(x).unflatten(-1, (3, self.heads, -1))

    def feed_forward(self, x: Tensor) -> Tensor:
        """Return what the feed-forward layer adds, (T, D) -> (T, D)."""
        hidden = self.linear1(x if self.rezero else self.feed_forward_norm(x))
        if self.glu:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = F.gelu(gate) * hidden
        else:
            hidden = F.gelu(hidden)
        branch = self.linear2(self.dropout(hidden))
        return self.feed_forward_norm(branch) if self.rezero else branch
