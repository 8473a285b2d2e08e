"""Attention within the cells of a pack: which tokens see which, and every backend that computes it.

Tokens of a cell stand as [<cls>, known genes, unknown genes], cells back to back. In `full` mode every token sees every
token of its cell. In `generative` mode every token sees `<cls>` and the known genes, and an unknown gene also sees
itself. On the known keys that is a rectangle without a mask, which flash kernels compute fast; the one self key of an
unknown gene is merged in afterwards (s: its logit, L: log-sum-exp over all keys):

    forward    O_k, L_k = flash(Q, K_known, V_known)
               L = logaddexp(L_k, s);   O = exp(L_k - L) O_k + exp(s - L) v
    backward   dQ, dK, dV = flash_backward(dO, Q, K_known, V_known, O, L)     with the MERGED O and L
               ds = exp(s - L) (<dO, v> - <dO, O>);  dq += scale ds k;  dk = scale ds q;  dv = exp(s - L) dO

Why the merged backward is exact: with P_ij = exp(S_ij - L_i), the softmax gradient is dS_ij = P_ij (<dO_i, v_j> -
<dO_i, O_i>). It depends on the whole key set only through O and L, and a flash backward recomputes P and dS from
whatever O and L it is given. Differentiating through L_k instead would be silently wrong: kernels return it without a
gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from scfm.data.batch import PackedBatch
from scfm.errors import ScfmError

Mode = Literal["generative", "full"]
aten = torch.ops.aten


@dataclass(frozen=True)
class Run:
    """Neighbouring cells of one length and one number of visible keys: one kernel call serves them all."""

    start: int
    cells: int
    length: int
    keys: int

    @property
    def stop(self) -> int:
        return self.start + self.cells * self.length

    def heads_first(self, x: Tensor) -> Tensor:
        """View the run's rows of a packed tensor, (T, H, ...) -> (cells, H, length, ...)."""
        return x[self.start : self.stop].unflatten(0, (self.cells, self.length)).transpose(1, 2)


@dataclass(frozen=True)
class AttentionLayout:
    """Where the cells of a pack lie and which keys their tokens see; built once per pack, used by every layer.

    Attributes:
        cu_seqlens: (N + 1,) cell boundaries.
        n_keys: (N,) leading tokens of each cell that all its tokens see.
        self_key: whether a token that is not among them also sees itself.
    """

    cu_seqlens: Tensor
    n_keys: Tensor
    self_key: bool = True

    @classmethod
    def of(cls, batch: PackedBatch, mode: Mode) -> AttentionLayout:
        """Build the layout of a pack."""
        if mode == "full":
            return cls(batch.cu_seqlens, batch.cu_seqlens.diff())
        return cls(batch.cu_seqlens, batch.n_known)

    @cached_property
    def runs(self) -> list[Run]:
        runs: list[Run] = []
        bounds = self.cu_seqlens.tolist()
        for start, stop, keys in zip(bounds, bounds[1:], self.n_keys.tolist(), strict=False):
            last = runs[-1] if runs else None
            if last and (last.length, last.keys) == (stop - start, keys):
                runs[-1] = Run(last.start, last.cells + 1, last.length, keys)
            else:
                runs.append(Run(start, 1, stop - start, keys))
        return runs

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor]:
        """(N, L) bool, the rows of a padded pack that hold tokens, and (N, 1, L, L) bool, which key each query sees."""
        lengths = self.cu_seqlens.diff()
        position = torch.arange(int(lengths.max()), device=lengths.device)
        holds_token = position < lengths[:, None]
        sees = (position < self.n_keys[:, None])[:, None, :].expand(-1, len(position), -1)
        if self.self_key:
            sees = sees | torch.eye(len(position), dtype=torch.bool, device=lengths.device)
        return holds_token, sees[:, None]


class _FlashCPU(torch.autograd.Function):
    """torch's CPU flash kernels on the visible keys, merged with each unknown gene's self key."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
        exact = torch.float64 if qkv.dtype == torch.float64 else torch.float32
        out = qkv.new_empty(len(qkv), *qkv.shape[2:])  # (T, H, d)
        lse = qkv.new_empty(out.shape[:2], dtype=exact)  # (T, H)
        p_self = torch.empty_like(lse)  # (T, H), on unknown rows only
        for run in layout.runs:
            q, k, v = (run.heads_first(x) for x in qkv.unbind(1))  # (cells, H, length, d)
            m = run.keys
            o, total = aten._scaled_dot_product_flash_attention_for_cpu(q, k[:, :, :m], v[:, :, :m], scale=scale)
            if m < run.length and layout.self_key:
                s = (q[:, :, m:].to(exact) * k[:, :, m:]).sum(-1).mul_(scale)  # (cells, H, unknown)
                known = total[:, :, m:].clone()
                total[:, :, m:] = torch.logaddexp(known, s)
                p = s.sub_(total[:, :, m:]).exp_()
                share = known.sub_(total[:, :, m:]).exp_()
                o[:, :, m:].mul_(share.unsqueeze(-1)).add_(p.unsqueeze(-1) * v[:, :, m:])
                run.heads_first(p_self)[:, :, m:] = p
            run.heads_first(out).copy_(o)
            run.heads_first(lse).copy_(total)
        ctx.save_for_backward(qkv, out, lse, p_self)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        qkv, out, lse, p_self = ctx.saved_tensors
        d_out, d_qkv = grads[0].contiguous(), torch.empty_like(qkv)
        for run in ctx.layout.runs:
            q, k, v = (run.heads_first(x) for x in qkv.unbind(1))  # (cells, H, length, d)
            dq, dk, dv = (run.heads_first(x) for x in d_qkv.unbind(1))
            do, o, m = run.heads_first(d_out), run.heads_first(out), run.keys
            known = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do, q, k[:, :, :m], v[:, :, :m], o, run.heads_first(lse), 0.0, False, scale=ctx.scale
            )
            for mine, theirs in zip((dq, dk[:, :, :m], dv[:, :, :m]), known, strict=True):
                mine.copy_(theirs)
            if not ctx.layout.self_key:
                dk[:, :, m:], dv[:, :, m:] = 0, 0
            if m < run.length and ctx.layout.self_key:
                q, k, v, do, o = (x[:, :, m:] for x in (q, k, v, do, o))
                p = run.heads_first(p_self)[:, :, m:].unsqueeze(-1)  # (cells, H, unknown, 1)
                do = do.to(p.dtype)
                ds = (do * v - do * o).sum(-1, keepdim=True) * p * ctx.scale
                dq[:, :, m:] += ds * k
                dk[:, :, m:] = ds * q
                dv[:, :, m:] = p * do
        return d_qkv, None, None


def flash_cpu(qkv: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
    return _FlashCPU.apply(qkv, layout, scale)


def dense(qkv: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
    holds_token, sees = layout.padded
    padded = qkv.new_zeros(*holds_token.shape, *qkv.shape[1:])  # (N, L, 3, H, d)
    padded[holds_token] = qkv
    q, k, v = padded.permute(2, 0, 3, 1, 4)  # each (N, H, L, d)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale)
    return out.transpose(1, 2)[holds_token]  # (T, H, d)


BACKENDS = {"flash_cpu": flash_cpu, "dense": dense}


def pick_backend(device: torch.device | str, backend: str = "auto") -> tuple[str, str]:
    """Return the name of the attention backend for a device, and the reason for it in words.

    Raises ScfmError if the backend that is asked for does not exist or does not run on the device.
    """
    kind = torch.device(device).type
    if backend == "auto":
        if kind == "cpu":
            return "flash_cpu", "torch's CPU flash kernels, merged with the self key of unknown genes"
        return "dense", f"no faster exact backend for {kind}: padded cells with a boolean mask"
    if backend not in BACKENDS:
        raise ScfmError(f"model.backend: there is no {backend!r}; choose from {', '.join(['auto', *BACKENDS])}")
    if backend == "flash_cpu" and kind != "cpu":
        raise ScfmError(f"model.backend: flash_cpu does not run on {kind}; choose auto or dense")
    return backend, "chosen by model.backend"


def attend(qkv: Tensor, layout: AttentionLayout, scale: float | None = None, backend: str = "auto") -> Tensor:
    """Let the tokens of each cell attend to each other as the layout says.

    Takes queries, keys and values as one (T, 3, H, d) tensor, the view of a joint projection, and returns (T, H, d).
    The scale is 1 / sqrt(d) unless given.
    """
    name, _ = pick_backend(qkv.device, backend)
    return BACKENDS[name](qkv, layout, qkv.shape[-1] ** -0.5 if scale is None else scale)
