"""Attention of scBERT's mixers by its definition: the matrix of weights, cell by cell, from the formulas."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scfm.model.features import COMPAT_EPS, EPS, KERNEL_EPS
from scfm.model.performer import Favor, LinearAttention, Mixer, Segments


def segments_of(lengths: list[int]) -> Segments:
    return Segments(F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int(), max(lengths))


def features(mixer: Mixer, q: Tensor, k: Tensor, kept: Tensor, peak: Tensor | None) -> tuple[Tensor, Tensor]:
    """Features of the queries and keys (H, n, d) of a cell; `peak` is compat's one maximum over the pack."""
    if isinstance(mixer, LinearAttention):
        return F.elu(q) + 1 + EPS, (F.elu(k) + 1 + EPS) * kept
    assert isinstance(mixer, Favor)
    if mixer.kernel == "none":
        return q.softmax(-1), (k if mixer.compat else k.masked_fill(kept == 0, -torch.inf)).softmax(-2)
    w = mixer.projection.to(q.dtype)
    y_q, y_k = q * q.shape[-1] ** -0.25, k * q.shape[-1] ** -0.25
    p_q, p_k = y_q @ w.t(), y_k @ w.t()
    if mixer.kernel != "exp":
        act = {"relu": F.relu, "gelu": F.gelu}[mixer.kernel]
        return act(p_q) + KERNEL_EPS, (act(p_k) + KERNEL_EPS) * (1 if mixer.compat else kept)
    n_q, n_k = y_q.square().sum(-1, keepdim=True) / 2, y_k.square().sum(-1, keepdim=True) / 2
    if mixer.compat:
        phi_q = torch.exp(p_q - n_q - p_q.amax(-1, keepdim=True)) + COMPAT_EPS
        return phi_q, torch.exp(p_k - n_k - peak) + COMPAT_EPS
    p_k = (p_k - n_k).masked_fill(kept == 0, -torch.inf)
    phi_k = torch.exp(p_k - p_k.detach().amax((-1, -2), keepdim=True)) + EPS
    return torch.exp(p_q - n_q), phi_k * kept


def weights(mixer: Mixer, qkv: Tensor, lengths: list[int], key_mask: Tensor | None = None) -> list[Tensor]:
    """The attention matrix (H, n, n) of each cell; in compat with zeros where values are masked."""
    mask = torch.ones(len(qkv), dtype=qkv.dtype) if key_mask is None else key_mask.to(qkv.dtype)
    peak = None
    if isinstance(mixer, Favor) and mixer.kernel == "exp":
        peak = (qkv[:, 1] * qkv.shape[-1] ** -0.25 @ mixer.projection.to(qkv.dtype).t()).amax()
    found, start = [], 0
    for length in lengths:
        q, k, _ = qkv[start : start + length].transpose(0, 2).unbind(1)  # (H, n, d)
        kept = mask[start : start + length]
        if isinstance(mixer, Favor | LinearAttention):
            phi_q, phi_k = features(mixer, q, k, kept[:, None], peak)
            products = phi_q @ phi_k.mT
            found.append(products / products.sum(-1, keepdim=True) * kept)
        else:
            logits = q @ k.mT * q.shape[-1] ** -0.5
            found.append(logits.masked_fill(kept == 0, -torch.inf).softmax(-1))
        start += length
    return found


def mixed(mixer: Mixer, qkv: Tensor, lengths: list[int], key_mask: Tensor | None = None) -> Tensor:
    """What a mixer returns, by its definition."""
    values = qkv[:, 2].split(lengths)
    matrices = weights(mixer, qkv, lengths, key_mask)
    return torch.cat([(w @ v.transpose(0, 1)).transpose(0, 1) for w, v in zip(matrices, values, strict=True)])
