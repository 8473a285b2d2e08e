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
from scfm.model.attention_cpu import Run, exact
from scfm.model.feature_attention import cell_runs, feature_attention, feature_scores
from scfm.model.features import KERNEL_EPS
from scfm.recipe import ModelConfig, PerformerConfig

# kernels computed in one piece: `none` has no more features than a head is wide; those of `gelu` may be negative, and
# where they nearly cancel in the normaliser, another order of summation is another result
WHOLE = ("gelu", "none")
LOGITS_AT_ONCE = 2**22  # of an attention matrix whose columns are summed


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
        """Return neighbouring cells of one length."""
        return cell_runs(self.cu_seqlens, self.longest, n_tokens)


class Mixer(nn.Module):
    """What reads a cell's genes: queries, keys and values (T, 3, H, d) -> (T, H, d)."""

    def forward(self, qkv: Tensor, segments: Segments, key_mask: Tensor | None = None) -> Tensor:
        """Mix within each cell.

        Args:
            qkv: (T, 3, H, d).
            segments: where the cells lie.
            key_mask: (T,) bool, False for a token that nobody reads (padding); every cell has one that is read.
        """
        raise NotImplementedError

    def gene_scores(self, qkv: Tensor, segments: Segments) -> Tensor:
        """Return (T,) the attention that each gene receives, mean over the queries of its cell and over heads.

        These are the column means of the attention matrix, which is not built; they sum to 1 in each cell.
        """
        raise NotImplementedError


class FeatureMixer(Mixer):
    """Attention through features.

    Attributes:
        kernel: what becomes of a projected vector; see `scfm.model.features`.
        compat: as scBERT's release; see `Favor`.
        projection: (m, d) buffer, random directions; (0, d) where nothing is projected.
    """

    projection: Tensor
    kernel: str
    compat = False

    def forward(self, qkv: Tensor, segments: Segments, key_mask: Tensor | None = None) -> Tensor:
        cells = segments.cu_seqlens, segments.longest
        return feature_attention(qkv, self.projection, *cells, self.kernel, self.compat, key_mask)

    def gene_scores(self, qkv: Tensor, segments: Segments) -> Tensor:
        cells = segments.cu_seqlens, segments.longest
        return feature_scores(qkv, self.projection, *cells, self.kernel, self.compat)


class Favor(FeatureMixer):
    """FAVOR+ (Choromanski et al. 2021), and the generalized and projection-free attention of scBERT's release.

    The kernel `none` takes softmax(q) over the width of a head and softmax(k) over the genes (Shen et al. 2021).

    `correct`: the stabiliser of keys is the largest exponent of their cell and head, without a gradient; eps is 1e-8;
    masked keys count neither in S nor in z.
    `compat`: the stabiliser of queries is their largest w_f y, that of keys ONE largest w_f y over all cells, heads,
    positions and features of the pack, both with their gradient; eps is 1e-4, so that batch mates change the result; a
    mask zeroes values only, and masked keys stay in z.
    """

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__()
        d = config.head_width
        m = default_features(d) if config.features is None else config.features
        if min(m, d) < 1:
            raise ScfmError(f"model.performer: {m} features of heads of width {d}: both must be at least 1")
        self.config = config
        self.kernel = config.kernel
        self.compat = config.mode == "compat"
        self.register_buffer("projection", torch.empty(m, d))
        self.redraw()

    def extra_repr(self) -> str:
        m, d = self.projection.shape
        return f"{self.config.mode}, kernel={self.kernel}, features={m}, head_width={d}"

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw new random directions from a generator of the CPU, torch's own where none is given."""
        m, d = self.projection.shape
        self.projection.copy_(orthogonal_directions(m, d, self.config.scaling == "norms", generator))

    def forward(self, qkv: Tensor, segments: Segments, key_mask: Tensor | None = None) -> Tensor:
        if self.kernel not in WHOLE:
            return super().forward(qkv, segments, key_mask)
        outs = []
        with torch.autocast(qkv.device.type, enabled=False):
            for phi_q, phi_k, v in self.whole(qkv, segments, key_mask):
                out = phi_q @ (phi_k.mT @ v) / (phi_q @ phi_k.sum(-2).unsqueeze(-1))
                outs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outs).to(qkv.dtype)

    def gene_scores(self, qkv: Tensor, segments: Segments) -> Tensor:
        if self.kernel not in WHOLE:
            return super().gene_scores(qkv, segments)
        scores = []
        with torch.autocast(qkv.device.type, enabled=False), torch.no_grad():
            for phi_q, phi_k, _ in self.whole(qkv, segments, None):
                mean_query = (phi_q / (phi_q @ phi_k.sum(-2).unsqueeze(-1))).mean(-2).unsqueeze(-1)
                scores.append((phi_k @ mean_query).squeeze(-1).mean(1).flatten())
        return torch.cat(scores)

    def whole(
        self, qkv: Tensor, segments: Segments, key_mask: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield features of queries and of keys (cells, H, n, m) and values (cells, H, n, d) of equal cells."""
        q, k, v = qkv.to(exact(qkv.dtype)).unbind(1)
        kept = q.new_ones(len(q), 1, 1) if key_mask is None else key_mask[:, None, None].to(q.dtype)
        if self.kernel == "gelu":
            weight = self.projection.to(q.dtype).t() * q.shape[-1] ** -0.25
            q, k = (F.gelu(x @ weight) + KERNEL_EPS for x in (q, k))
            k = k if self.compat else k * kept
        elif not self.compat:
            k = k.masked_fill(kept == 0, -torch.inf)
        for run in segments.runs(len(qkv)):
            phi_q, phi_k, values = (run.heads_first(x) for x in (q, k, v * kept))
            if self.kernel == "none":
                phi_q, phi_k = phi_q.softmax(-1), phi_k.softmax(-2)
            yield phi_q, phi_k, values


def default_features(head_width: int) -> int:
    """Return int(d ln d), as many random features as scBERT takes."""
    return int(head_width * math.log(head_width))


def orthogonal_directions(m: int, d: int, norms: bool, generator: torch.Generator | None) -> Tensor:
    """Draw (m, d) directions, orthogonal within each d of them; lengths sqrt(d), or those of Gaussian vectors.

    Q of a QR decomposition is uniform only once the diagonal of R is made positive (Mezzadri 2007). Without that the
    first direction of every block points away from the first axis, and the features are biased.
    """
    draw: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    blocks = []
    for _ in range(-(-m // d)):
        q, r = torch.linalg.qr(torch.randn(d, d, **draw))
        blocks.append((q * r.diagonal().sign()).t())
    lengths = torch.randn(m, d, **draw).norm(dim=1, keepdim=True) if norms else math.sqrt(d)
    return torch.cat(blocks)[:m] * lengths


class LinearAttention(FeatureMixer):
    """Attention with the features elu(x) + 1 (Katharopoulos et al. 2020)."""

    kernel = "elu"

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.register_buffer("projection", torch.empty(0, head_width), persistent=False)


class Softmax(Mixer):
    """Exact attention, in the fastest backend of the device (`scfm.model.attention`)."""

    def forward(self, qkv: Tensor, segments: Segments, key_mask: Tensor | None = None) -> Tensor:
        cu_seqlens, n_tokens = segments.cu_seqlens, len(qkv)
        layout = AttentionLayout(cu_seqlens, cu_seqlens.diff(), n_tokens, segments.longest, self_key=False)
        backend, _ = pick_backend(qkv.device, qkv.dtype, qkv.shape[-1])
        if key_mask is None:
            return prepare(layout, backend)(qkv)
        # backends read the first tokens of each cell: those that are kept are brought there, and back
        order = torch.argsort(2 * layout.cell + ~key_mask, stable=True)
        n_keys = torch.zeros_like(layout.n_keys).index_add_(0, layout.cell, key_mask.to(torch.int32))
        kept_first = AttentionLayout(cu_seqlens, n_keys, n_tokens, segments.longest, self_key=False)
        return prepare(kept_first, backend)(qkv[order])[order.argsort()]

    @torch.no_grad()
    def gene_scores(self, qkv: Tensor, segments: Segments) -> Tensor:
        scores = []
        with torch.autocast(qkv.device.type, enabled=False):
            for run in segments.runs(len(qkv)):
                q, k, _ = (run.heads_first(x).to(exact(x.dtype)) for x in qkv.unbind(1))  # (cells, H, n, d)
                received = q.new_zeros(q.shape[:-1])
                for rows in q.split(max(LOGITS_AT_ONCE // received.numel(), 1), dim=2):
                    received += (rows @ k.mT * q.shape[-1] ** -0.5).softmax(-1).sum(-2)
                scores.append(received.mean(1).flatten() / run.length)
        return torch.cat(scores)


def build_mixer(config: ModelConfig) -> Mixer:
    """Return the mixer that a recipe names."""
    if config.mixer == "favor":
        return Favor(config.performer)
    return LinearAttention(config.performer.head_width) if config.mixer == "linear" else Softmax()
