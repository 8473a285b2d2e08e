"""Attention within the cells of a pack: which tokens see which, and every backend that computes it.

Tokens of a cell stand as [<cls>, known genes, unknown genes], cells back to back. In `full` mode every token sees every
token of its cell. In `generative` mode every token sees `<cls>` and the known genes, and an unknown gene also sees
itself. On the known keys that is a rectangle without a mask, which flash kernels compute fast; the one self key of an
unknown gene is merged in afterwards (s: its logit, L: log-sum-exp over all keys):

    forward    O_k, L_k = flash(Q, K_known, V_known)
               L = logaddexp(L_k, s);   O = exp(L_k - L) O_k + exp(s - L) v
    backward   dQ, dK, dV = flash_backward(dO, Q, K_known, V_known, O, L)     with the MERGED O and L
               ds = exp(s - L) (<dO, v> - <dO, O>);  dq += scale ds k;  dk += scale ds q;  dv += exp(s - L) dO

Why the merged backward is exact: with P_ij = exp(S_ij - L_i), the softmax gradient is dS_ij = P_ij (<dO_i, v_j> -
<dO_i, O_i>). It depends on the whole key set only through O and L, and a flash backward recomputes P and dS from
whatever O and L it is given. Differentiating through L_k instead would be silently wrong: kernels return it without a
gradient.

Kernels are custom operators: opaque to torch.compile, with shapes for fake tensors and FLOP formulas. On CUDA a pack
goes to a varlen kernel as two sequences per cell, (all its tokens, visible keys) and (no queries, hidden keys): the
second costs nothing, and its zero gradients fill the rows of keys that nobody sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling
from torch.library import custom_op
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.flop_counter import register_flop_formula

from scfm.data.batch import PackedBatch
from scfm.errors import ScfmError
from scfm.model.attention_cpu import (
    block_attention,
    cell_attention,
    exact,
    merge,
    pairs_of,
    self_gradient,
    self_logit,
)
from scfm.model.precision import multiplies_bf16

Mode = Literal["generative", "full"]
Attention = Callable[[Tensor], Tensor]  # queries, keys and values (T, 3, H, d) -> (T, H, d)
aten = torch.ops.aten
BLOCK = 128
NO_WINDOW = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}


@dataclass(frozen=True)
class AttentionLayout:
    """Where the cells of a pack lie and which keys their tokens see.

    Attributes:
        cu_seqlens: (N + 1,) int32 cell boundaries.
        n_keys: (N,) int32 leading tokens of each cell that all its tokens see.
        n_tokens: T.
        longest: no cell has more tokens.
        self_key: whether a token that is not among the visible keys also sees itself.
    """

    cu_seqlens: Tensor
    n_keys: Tensor
    n_tokens: int
    longest: int
    self_key: bool = True

    @classmethod
    def of(cls, batch: PackedBatch, mode: Mode) -> AttentionLayout:
        """Build the layout of a pack."""
        full = mode == "full"
        n_keys = batch.cu_seqlens.diff() if full else batch.n_known
        return cls(batch.cu_seqlens, n_keys, batch.n_tokens, batch.longest, self_key=not full)

    @cached_property
    def cell(self) -> Tensor:
        """(T,) the cell of each token."""
        cells = torch.arange(len(self.n_keys), device=self.n_keys.device)
        return torch.repeat_interleave(cells, self.cu_seqlens.diff(), output_size=self.n_tokens)

    @cached_property
    def visible(self) -> Tensor:
        """(T,) bool, the tokens that are keys for all of their cell."""
        stop = self.cu_seqlens[:-1] + self.n_keys
        return torch.arange(self.n_tokens, device=stop.device) < stop[self.cell]

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor]:
        """(T,) the row of each token among the N L of a padded pack, and (N, 1, L, L) bool, which key a query sees."""
        lengths = self.cu_seqlens.diff()
        position = torch.arange(int(lengths.max()), device=lengths.device)
        padding = (len(position) - lengths).cumsum(0) - (len(position) - lengths)  # (N,) before each cell
        row = torch.arange(self.n_tokens, device=lengths.device) + padding[self.cell]
        sees = (position < self.n_keys[:, None])[:, None, :].expand(-1, len(position), -1)
        if self.self_key:
            sees = sees | torch.eye(len(position), dtype=torch.bool, device=lengths.device)
        return row, sees[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# CPU kernels, cell by cell


@dataclass(frozen=True)
class Cells:
    """A CPU kernel on the cells of a pack; see `scfm.model.attention_cpu`."""

    layout: AttentionLayout
    kernel: Callable[[Tensor, Tensor, Tensor, bool, float], Tensor]

    def __call__(self, qkv: Tensor, scale: float | None = None) -> Tensor:
        layout = self.layout
        return self.kernel(qkv, layout.cu_seqlens, layout.n_keys, layout.self_key, default(scale, qkv))


# ---------------------------------------------------------------------------------------------------------------------
# CUDA: varlen flash kernels over two sequences per cell; the merge is plain torch code, which Inductor fuses


@custom_op("scfm::varlen_attention", mutates_args=(), device_types="cuda")
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest: int, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    """Attend sequence by sequence without a mask; return (T, H, d) and the log-sum-exp (H, T) in float32."""
    if kernel == "flash_attn_2":
        run = import_module("flash_attn.flash_attn_interface")._flash_attn_varlen_forward
        out, lse, *_ = run(q, k, v, cu_q, cu_k, longest, longest, 0.0, scale, False, **NO_WINDOW)
    else:
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, cu_q, cu_k, longest, longest, 0.0, False, False, scale=scale
        )
    return out, lse


@custom_op("scfm::varlen_attention_backward", mutates_args=(), device_types="cuda")
def varlen_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    longest: int,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, (T, H, d) each, recomputed from the out and lse that are given."""
    if kernel == "flash_attn_2":
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        run = import_module("flash_attn.flash_attn_interface")._flash_attn_varlen_backward
        run(d_out, q, k, v, out, lse, *grads, cu_q, cu_k, longest, longest, 0.0, scale, False, **NO_WINDOW,
            deterministic=torch.are_deterministic_algorithms_enabled())  # fmt: skip
        return grads[0], grads[1], grads[2]
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return aten._flash_attention_backward(
        d_out, q, k, v, out, lse, cu_q, cu_k, longest, longest, 0.0, False, no_dropout, no_dropout[:0], scale=scale
    )


@varlen_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty((q.shape[1], q.shape[0]), dtype=exact(q.dtype))


@varlen_attention_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        hidden: Tensor | None,
        longest: int,
        scale: float,
        kernel: str,
    ) -> Tensor:
        q, k, v = qkv.unbind(1)
        out, lse = torch.ops.scfm.varlen_attention(q, k, v, cu_q, cu_k, longest, scale, kernel)
        p = None
        if hidden is not None:
            s = self_logit(q, k, scale, lse.dtype).masked_fill(~hidden[:, None], -torch.inf)  # (T, H)
            merged, total, p = merge(v, out, lse.t(), s)
            out, lse = merged.to(q.dtype), total.t().contiguous()
        ctx.save_for_backward(qkv, out, lse, p, cu_q, cu_k)
        ctx.constants = longest, scale, kernel
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse, p, cu_q, cu_k = ctx.saved_tensors
        d_out, (longest, scale, kernel) = grads[0].contiguous(), ctx.constants
        parts = qkv.unbind(1)
        known = torch.ops.scfm.varlen_attention_backward(d_out, *parts, out, lse, cu_q, cu_k, longest, scale, kernel)
        if p is not None:
            added = self_gradient(parts, out, p, d_out, scale)
            known = tuple((mine + more).to(qkv.dtype) for mine, more in zip(known, added, strict=True))
        return torch.stack(known, 1), None, None, None, None, None, None


@dataclass(frozen=True)
class Varlen:
    """Flash kernels over packed sequences; a cell is one, or two where some of its keys are hidden.

    Attributes:
        cu_q, cu_k: boundaries of the sequences among queries and among keys.
        hidden: (T,) bool, the tokens that see themselves besides the visible keys; None where there are none.
        longest: no sequence is longer; a constant of the run, for kernels are compiled for it.
        kernel: flash (torch's own), flash_attn_2 or flash_attn_3.
    """

    cu_q: Tensor
    cu_k: Tensor
    hidden: Tensor | None
    longest: int
    kernel: str

    @classmethod
    def of(cls, layout: AttentionLayout, kernel: str) -> Varlen:
        starts, stops = layout.cu_seqlens[:-1], layout.cu_seqlens[1:]
        cu_q = layout.cu_seqlens.repeat_interleave(2)[1:]  # [0, M1, M1, M1 + M2, M1 + M2, ...]
        cu_k = torch.stack([starts + layout.n_keys, stops], 1).flatten()
        cu_k = torch.cat([starts[:1], cu_k])  # [0, K1, M1, M1 + K2, M1 + M2, ...]
        hidden = ~layout.visible if layout.self_key else None
        return cls(cu_q.contiguous(), cu_k.to(torch.int32), hidden, layout.longest, kernel)

    def __call__(self, qkv: Tensor, scale: float | None = None) -> Tensor:
        scale = default(scale, qkv)
        return _VarlenAttention.apply(qkv, self.cu_q, self.cu_k, self.hidden, self.longest, scale, self.kernel)


@register_flop_formula(torch.ops.scfm.varlen_attention, get_raw=True)
def _(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *_: Any, **__: Any) -> int:
    return 4 * pairs_of(len(q), cu_q.diff(), cu_k.diff()) * q.shape[1] * q.shape[2]


@register_flop_formula(torch.ops.scfm.varlen_attention_backward, get_raw=True)
def _(
    d: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, *_: Any, **__: Any
) -> int:
    return 10 * pairs_of(len(q), cu_q.diff(), cu_k.diff()) * q.shape[1] * q.shape[2]


# ---------------------------------------------------------------------------------------------------------------------
# FlexAttention: public calls only. Its block mask is derived from the cells' boundaries; testing T^2 pairs is too slow


@dataclass(frozen=True)
class Flex:
    """FlexAttention over the whole pack as one sequence, blocks that no cell needs left out."""

    mask: BlockMask

    @classmethod
    def of(cls, layout: AttentionLayout) -> Flex:
        return cls(block_mask(layout))

    def __call__(self, qkv: Tensor, scale: float | None = None) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in qkv.unbind(1))  # (1, H, T, d)
        flex: Any = fused_flex() if qkv.is_cuda else flex_attention
        return flex(q, k, v, block_mask=self.mask, scale=default(scale, qkv))[0].transpose(0, 1)


def fused_flex() -> Any:
    """Return FlexAttention as one kernel; without compilation it would build all T^2 logits.

    A compiled block compiles it too, and must not meet another torch.compile.
    """
    return flex_attention if is_compiling() else compiled_flex()


@cache
def compiled_flex() -> Any:
    return torch.compile(flex_attention)


def block_mask(layout: AttentionLayout) -> BlockMask:
    """Return which blocks of 128 queries see which blocks of 128 keys, wholly, in part or not at all."""
    n, device = layout.n_tokens, layout.cu_seqlens.device
    n_blocks = -(-n // BLOCK)
    cell, visible, self_key = layout.cell, layout.visible, layout.self_key

    def in_blocks(x: Tensor, filler: int) -> Tensor:
        return F.pad(x, (0, n_blocks * BLOCK - n), value=filler).view(n_blocks, BLOCK)

    nobody = len(layout.n_keys)
    cells = in_blocks(cell, int(nobody - 1))
    first, last = cells[:, 0], cells[:, -1]  # (blocks,) the cells whose tokens lie in a block are a range
    keys = in_blocks(torch.where(visible, cell, -1), -1)
    last_key = keys.max(1).values  # and so are the cells whose visible keys do
    first_key = torch.where(keys < 0, nobody, keys).min(1).values
    some = (first_key <= last[:, None]) & (last_key >= first[:, None])  # (queries' blocks, keys' blocks)
    whole = (first == last)[:, None] & (keys.min(1).values == last_key) & (first_key == first[:, None])
    whole[-1] &= n % BLOCK == 0
    if self_key:
        some = some | torch.eye(n_blocks, dtype=torch.bool, device=device)

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        shared = (cell[query] == cell[key]) & visible[key]
        return shared | (query == key) if self_key else shared

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        return blocks.sum(-1, dtype=torch.int32)[None, None], order[None, None]

    return BlockMask.from_kv_blocks(
        *listed(some & ~whole), *listed(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(n, n)
    )


# ---------------------------------------------------------------------------------------------------------------------
# the reference


@dataclass(frozen=True)
class Dense:
    """Padded cells with a boolean mask: slow, exact, on any device; what the other backends are tested against.

    Tokens are found by their rows: a boolean index would be a graph break, which compiled blocks refuse.
    """

    row: Tensor
    sees: Tensor
    dropout: float = 0.0

    def __call__(self, qkv: Tensor, scale: float | None = None) -> Tensor:
        cells, length = self.sees.shape[0], self.sees.shape[-1]
        padded = qkv.new_zeros(cells * length, *qkv.shape[1:]).index_put((self.row,), qkv)
        q, k, v = padded.unflatten(0, (cells, length)).permute(2, 0, 3, 1, 4)  # each (N, H, L, d)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.sees, dropout_p=self.dropout, scale=default(scale, qkv)
        )
        return out.transpose(1, 2).flatten(0, 1).index_select(0, self.row)  # (T, H, d)


# ---------------------------------------------------------------------------------------------------------------------
# the choice


def default(scale: float | None, qkv: Tensor) -> float:
    return qkv.shape[-1] ** -0.5 if scale is None else scale


def varlen(kernel: str) -> Callable[[AttentionLayout], Attention]:
    return lambda layout: Varlen.of(layout, kernel)


BACKENDS: dict[str, Callable[[AttentionLayout], Attention]] = {
    "flash": varlen("flash"),
    "flash_attn_2": varlen("flash_attn_2"),
    "flash_attn_3": varlen("flash_attn_3"),
    "flex": Flex.of,
    "flash_cpu": lambda layout: Cells(layout, cell_attention),
    "blocks_cpu": lambda layout: Cells(layout, block_attention),
    "dense": lambda layout: Dense(*layout.padded),
}
PACKAGES = {"flash_attn_2": "flash_attn", "flash_attn_3": "flash_attn_interface"}
active: set[str] = set()  # kernels that stand in for torch's own


def pick_backend(
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    head_width: int = 64,
    asked: str = "auto",
    dropout: float = 0.0,
) -> tuple[str, str]:
    """Return the name of the attention backend for a device, and the reason for it in words.

    Args:
        device: where attention runs.
        dtype: of queries, keys and values, under autocast its type.
        head_width: width of a head, d.
        asked: `auto`, or a backend.
        dropout: of attention weights, which flash kernels with a merged self key do not have.

    Raises ScfmError if the backend that is asked for does not exist or does not run there.
    """
    device = torch.device(device)
    if asked != "auto" and asked not in BACKENDS:
        raise ScfmError(f"model.backend: there is no {asked!r}; choose from {', '.join(['auto', *BACKENDS])}")
    if dropout > 0:
        if asked not in ("auto", "dense"):
            raise ScfmError(
                f"model.backend: {asked} cannot drop attention weights; choose auto, or no attention_dropout"
            )
        return "dense", "padded cells with a boolean mask, for model.attention_dropout needs the weights"
    if asked == "auto":
        if device.type == "cpu" and why_not("blocks_cpu", device, dtype, head_width) is None:
            return "blocks_cpu", "bf16 products of blocks that stay in the cache"
        if device.type == "cpu":
            return "flash_cpu", "torch's CPU flash kernels, merged with the self key of unknown genes"
        against = why_not("flash", device, dtype, head_width)
        if against:
            return "dense", f"padded cells with a boolean mask, for flash {against}"
        if why_not("flash_attn_3", device, dtype, head_width) is None:
            return "flash_attn_3", "the flash-attn 3 package on a Hopper GPU, merged with the self key of unknown genes"
        return "flash", "torch's own flash kernels, merged with the self key of unknown genes"
    against = why_not(asked, device, dtype, head_width)
    if against:
        raise ScfmError(f"model.backend: {asked} {against}; choose auto")
    return asked, "chosen by model.backend"


def why_not(backend: str, device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """Return why a backend cannot run on a device, None where it can."""
    if backend == "dense":
        return None
    if backend.endswith("_cpu") and device.type != "cpu":
        return f"does not run on {device.type}"
    if backend == "flash_cpu":
        return None
    if backend == "blocks_cpu":
        if dtype != torch.bfloat16:
            return f"needs bf16 (trainer.precision: bf16-mixed), not {dtype}".replace("torch.", "")
        return None if multiplies_bf16("cpu") else "needs a CPU with bf16 products"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"does not run on {'ROCm' if device.type == 'cuda' else device.type}"
    if backend == "flex":
        return None if head_width >= 16 else f"needs heads of at least 16, not {head_width}"
    package = PACKAGES.get(backend)
    if package and find_spec(package) is None:
        return f"needs the package {package}, which is not installed"
    capability = torch.cuda.get_device_capability(device)
    if backend == "flash_attn_3" and capability != (9, 0):
        return "needs a Hopper GPU"
    if capability < (8, 0):
        return "needs an Ampere GPU or newer"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bf16 or fp16 (trainer.precision: bf16-mixed), not {dtype}".replace("torch.", "")
    if head_width % 8 or head_width > 256:
        return f"needs heads of a multiple of 8 up to 256, not {head_width}"
    return None


def prepare(layout: AttentionLayout, backend: str, dropout: float = 0.0) -> Attention:
    """Return the attention of a pack, to be called by every layer; what the backend needs is laid out once."""
    if dropout > 0:
        return Dense(*layout.padded, dropout)
    if layout.cu_seqlens.is_cuda and (backend == "flash_attn_3") != ("FA3" in active):
        if active:
            restore_flash_attention_impl()
            active.clear()
        else:
            activate_flash_attention_impl("FA3")  # torch's flash operators now run that package's kernels
            active.add("FA3")
    return BACKENDS[backend](layout)
