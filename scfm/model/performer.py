"""Mixers: how the genes of a cell read each other in scBERT's blocks.

Three of them behind one interface. `softmax` is exact attention. `favor` and `linear` give queries and keys features
phi, and read the values through them in time and memory linear in the number of genes:

    out_i = phi(q_i) S / phi(q_i) z,     S = sum_j phi(k_j)^T v_j,     z = sum_j phi(k_j)

`linear` takes phi(x) = elu(x) + 1 (Katharopoulos et al. 2020), `favor` random features whose products are softmax
weights on average (FAVOR+, Choromanski et al. 2021): with y = x / d^(1/4) and m random directions w,

    phi(x)_f = exp(w_f y - |y|^2 / 2 - c) + eps     (a factor m^(-1/2) of the paper cancels between S and z)

The stabiliser c keeps exp in range; it cancels, but for eps. `correct` gives each cell and head its own, and computes
in float32 whatever it is handed; `compat` computes as scBERT's release does, where batch mates matter: see `Favor`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfm.data.batch import PackedBatch
from scfm.errors import ScfmError
from scfm.model.attention import AttentionLayout, pick_backend, prepare
from scfm.model.attention_cpu import Run, exact, runs_of
from scfm.recipe import ModelConfig, PerformerConfig

EPS = {"correct": 1e-6, "compat": 1e-4}
KERNEL_EPS = 1e-3  # of the generalized kernels, in both modes
QUERIES_AT_ONCE = 256  # rows of an attention matrix that exist together


@dataclass(frozen=True)
class Segments:
    """Where the cells of a pack lie.

    Attributes:
        cu_seqlens: (N + 1,) int32 cell boundaries.
        longest: no cell has more tokens.
    """

    cu_seqlens: Tensor
    longest: int

    @classmethod
    def of(cls, batch: PackedBatch) -> Segments:
        return cls(batch.cu_seqlens, batch.longest)

    def runs(self, n_tokens: int) -> list[Run]:
        """Return neighbouring cells of one length, to be computed together; equal cells need no look at the device."""
        n_cells = len(self.cu_seqlens) - 1
        if self.longest * n_cells == n_tokens:
            return [Run(0, n_cells, self.longest, self.longest)]
        return runs_of(self.cu_seqlens, self.cu_seqlens.diff())


class Mixer(nn.Module):
    """What reads a cell's genes: queries, keys and values (T, 3, H, d) -> (T, H, d)."""

    def forward(self, qkv: Tensor, segments: Segments, key_mask: Tensor | None = None) -> Tensor:
        """Mix within each cell.

        Args:
            qkv: (T, 3, H, d).
            segments: where the cells lie.
            key_mask: (T,) bool, False for a token that nobody reads (padding).
        """
        raise NotImplementedError

    def gene_scores(self, qkv: Tensor, segments: Segments) -> Tensor:
        """Return (T,) the attention each gene receives: mean over the queries of its cell and over heads; sums to 1."""
        raise NotImplementedError


class FeatureMixer(Mixer):
    """Attention through features, for any feature map."""

    def features(self, q: Tensor, k: Tensor, key_mask: Tensor | None, runs: list[Run]) -> tuple[Tensor, Tensor]:
        """Return the features (T, H, m) of queries and keys (T, H, d)."""
        raise NotImplementedError

    def forward(self, qkv: Tensor, segments: Segments, key_mask: Tensor | None = None) -> Tensor:
        with torch.autocast(qkv.device.type, enabled=False):
            q, k, v = qkv.to(exact(qkv.dtype)).unbind(1)
            runs = segments.runs(len(qkv))
            phi_q, phi_k = self.features(q, k, key_mask, runs)
            if key_mask is not None:
                v = v * key_mask[:, None, None]
            outs = []
            for run in runs:
                fq, fk, values = (run.heads_first(x) for x in (phi_q, phi_k, v))
                out = fq @ (fk.mT @ values) / (fq @ fk.sum(-2).unsqueeze(-1))
                outs.append(out.transpose(1, 2).flatten(0, 1))
            return torch.cat(outs).to(qkv.dtype)

    def gene_scores(self, qkv: Tensor, segments: Segments) -> Tensor:
        with torch.autocast(qkv.device.type, enabled=False):
            q, k, _ = qkv.to(exact(qkv.dtype)).unbind(1)
            runs = segments.runs(len(qkv))
            phi_q, phi_k = self.features(q, k, None, runs)
            scores = []
            for run in runs:
                fq, fk = run.heads_first(phi_q), run.heads_first(phi_k)  # (cells, H, n, m)
                normaliser = fq @ fk.sum(-2).unsqueeze(-1)
                asked = (fq / normaliser).mean(-2).unsqueeze(-1)  # (cells, H, m, 1), the mean query
                scores.append((fk @ asked).squeeze(-1).mean(1).flatten())
            return torch.cat(scores)


class Favor(FeatureMixer):
    """FAVOR+ (Choromanski et al. 2021), and the generalized and projection-free forms of scBERT's release.

    `correct`: the stabiliser of keys is the maximum of the whole exponent per cell and head, without a gradient; eps
    is 1e-6; masked keys count neither in S nor in z.
    `compat`: the stabiliser of queries is the maximum of w_f y over features, that of keys ONE maximum of w_f y over
    all cells, heads, positions and features, both with their gradient; eps is 1e-4, so that batch mates change the
    result; a mask zeroes values only, and masked keys stay in z.

    Attributes:
        projection: (m, d) buffer, the random directions; all heads share them.
    """

    projection: Tensor

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__()
        d = config.head_width
        m = int(d * math.log(d)) if config.features is None else config.features
        if min(m, d) < 1:
            raise ScfmError(
                f"model.performer: {m} features of heads of width {d}; both must be at least 1 (a width of 1 or 2 "
                "needs `features`)"
            )
        self.config = config
        self.compat = config.mode == "compat"
        self.register_buffer("projection", torch.empty(m, d))
        self.redraw()

    def extra_repr(self) -> str:
        m, d = self.projection.shape
        return f"{self.config.mode}, kernel={self.config.kernel}, features={m}, head_width={d}"

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw new random directions, orthogonal within each d of them, from a CPU generator (default: torch's own)."""
        m, d = self.projection.shape
        self.projection.copy_(orthogonal_directions(m, d, self.config.scaling == "norms", generator))

    def features(self, q: Tensor, k: Tensor, key_mask: Tensor | None, runs: list[Run]) -> tuple[Tensor, Tensor]:
        kept = None if key_mask is None or self.compat else key_mask[:, None, None]
        kernel = self.config.kernel
        if kernel == "none":
            logits = k if kept is None else k.masked_fill(~kept, -torch.inf)
            return q.softmax(-1), torch.cat([run_softmax(logits, run) for run in runs])
        weight = self.projection.to(q.dtype) * q.shape[-1] ** -0.25
        p_q, p_k = q @ weight.t(), k @ weight.t()
        if kernel != "exp":
            act = F.relu if kernel == "relu" else F.gelu
            phi_q, phi_k = act(p_q) + KERNEL_EPS, act(p_k) + KERNEL_EPS
            return phi_q, phi_k if kept is None else phi_k * kept
        half = 0.5 * q.shape[-1] ** -0.5
        n_q, n_k = (x.square().sum(-1, keepdim=True) * half for x in (q, k))
        eps = EPS[self.config.mode]
        if self.compat:
            phi_q = (p_q - n_q - p_q.amax(-1, keepdim=True)).exp() + eps
            return phi_q, (p_k - n_k - p_k.amax()).exp() + eps
        p_q, p_k = p_q - n_q, p_k - n_k
        phi_q = (p_q - p_q.detach().amax(-1, keepdim=True)).exp() + eps
        if kept is not None:
            p_k = p_k.masked_fill(~kept, -torch.inf)
        phi_k = torch.cat([(p_k[at] - c).exp() for at, c in maxima(p_k.detach(), runs)]) + eps
        return phi_q, phi_k if kept is None else phi_k * kept


def run_softmax(k: Tensor, run: Run) -> Tensor:
    return run.heads_first(k).softmax(-2).transpose(1, 2).flatten(0, 1)


def maxima(p: Tensor, runs: list[Run]) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of each cell and the maximum of p (T, H, m) over them, per head (1, H, 1)."""
    for run in runs:
        for cell in range(run.cells):
            at = slice(run.start + cell * run.length, run.start + (cell + 1) * run.length)
            yield at, p[at].amax((0, 2), keepdim=True).clamp_min(torch.finfo(p.dtype).min)


def orthogonal_directions(m: int, d: int, norms: bool, generator: torch.Generator | None) -> Tensor:
    """Draw (m, d) directions, orthogonal within each d of them; lengths sqrt(d), or those of Gaussian vectors.

    Q of a QR decomposition is uniform only once the diagonal of R is made positive (Mezzadri 2007): without that the
    first direction of every block always points away from the first axis, and the features are biased.
    """
    draw: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    blocks = []
    for _ in range(-(-m // d)):
        q, r = torch.linalg.qr(torch.randn(d, d, **draw))
        blocks.append((q * r.diagonal().sign()).t())
    directions = torch.cat(blocks)[:m]
    lengths = torch.randn(m, d, **draw).norm(dim=1, keepdim=True) if norms else math.sqrt(d)
    return directions * lengths


class LinearAttention(FeatureMixer):
    """Attention with the features elu(x) + 1 (Katharopoulos et al. 2020)."""

    def features(self, q: Tensor, k: Tensor, key_mask: Tensor | None, runs: list[Run]) -> tuple[Tensor, Tensor]:
        phi_q, phi_k = F.elu(q) + 1, F.elu(k) + 1
        return phi_q, phi_k if key_mask is None else phi_k * key_mask[:, None, None]


class Softmax(Mixer):
    """Exact attention, in the fastest backend of the device (`scfm.model.attention`)."""

    def forward(self, qkv: Tensor, segments: Segments, key_mask: Tensor | None = None) -> Tensor:
        cu_seqlens, n_tokens = segments.cu_seqlens, len(qkv)
        layout = AttentionLayout(cu_seqlens, cu_seqlens.diff(), n_tokens, segments.longest, self_key=False)
        backend, _ = pick_backend(qkv.device, qkv.dtype, qkv.shape[-1])
        if key_mask is None:
            return prepare(layout, backend)(qkv)
        # backends read the first tokens of each cell: those that are kept are brought there and back
        order = torch.argsort(2 * layout.cell + ~key_mask, stable=True)
        n_keys = torch.zeros_like(layout.n_keys).index_add_(0, layout.cell, key_mask.to(layout.n_keys.dtype))
        masked = AttentionLayout(cu_seqlens, n_keys, n_tokens, segments.longest, self_key=False)
        return prepare(masked, backend)(qkv[order])[order.argsort()]

    def gene_scores(self, qkv: Tensor, segments: Segments) -> Tensor:
        scores = []
        with torch.autocast(qkv.device.type, enabled=False):
            for run in segments.runs(len(qkv)):
                q, k, _ = (run.heads_first(x) for x in qkv.to(exact(qkv.dtype)).unbind(1))
                received = q.new_zeros(q.shape[:-1])  # (cells, H, n)
                for rows in q.split(QUERIES_AT_ONCE, dim=2):
                    received += (rows @ k.mT * q.shape[-1] ** -0.5).softmax(-1).sum(-2)
                scores.append(received.mean(1).flatten() / run.length)
        return torch.cat(scores)


def build_mixer(config: ModelConfig) -> Mixer:
    """Return the mixer that a recipe names."""
    if config.mixer == "favor":
        return Favor(config.performer)
    return LinearAttention() if config.mixer == "linear" else Softmax()
