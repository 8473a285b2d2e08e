"""Features of queries and keys, block by block, and the products that attention through them is made of.

Features are phi = E + eps, a row of m for each query and key. exp runs as 2^x, with log2(e) folded into the projection:
torch's exp is MKL's, which takes four times as long on AMD processors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scfm.model.attention_cpu import Run, exact
from scfm.model.layers import onednn

aten = torch.ops.aten
LOG2E = math.log2(math.e)
FEATURES_PER_BLOCK = {"cpu": 2**18, "cuda": 2**26}  # 1 MB of float32, a core's L2 cache; 256 MB
EPS = 1e-8  # keeps normalisers above zero; errors to exact softmax are those of 0 (docs/concepts/performer.md)
COMPAT_EPS = 1e-4
KERNEL_EPS = 1e-3  # of relu and gelu, in both modes
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda p: F.relu(p).add_(KERNEL_EPS),
    "elu": lambda p: F.elu(p).add_(1).add_(EPS),
}


# ---------------------------------------------------------------------------------------------------------------------
# blocks and products


@dataclass(frozen=True)
class Block:
    """Some positions of some heads of some cells of a run: b matrices, one per cell and head."""

    run: Run
    first_cell: int
    cells: slice
    heads: slice
    rows: slice

    def of(self, x: Tensor) -> Tensor:
        """View the block in a packed tensor, (T, H, ...) -> (cells, heads, c, ...)."""
        return self.run.heads_first(x)[self.cells, self.heads, self.rows]

    def take(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy the block out of a packed tensor, (T, H, ...) -> (b, c, ...)."""
        return self.of(x).to(dtype).flatten(0, 1).contiguous()

    def put(self, x: Tensor, value: Tensor) -> None:
        """Copy the block into a packed tensor."""
        view = self.of(x)
        view.copy_(value.view(view.shape))

    def of_cells(self, x: Tensor) -> Tensor:
        """View what a tensor (N, H, ...) has for the block, (cells, heads, ...)."""
        return x[self.first_cell + self.cells.start : self.first_cell + self.cells.stop, self.heads]


def blocks(runs: list[Run], n_heads: int, m: int, device: torch.device) -> Iterator[Block]:
    """Yield the blocks of a pack, cell after cell."""
    room, first_cell = max(FEATURES_PER_BLOCK["cpu" if device.type == "cpu" else "cuda"] // m, 1), 0
    for run in runs:
        rows = min(run.length, room)
        heads = min(n_heads, max(room // rows, 1))
        cells = max(room // (rows * n_heads), 1)
        for cell in range(0, run.cells, cells):
            for head in range(0, n_heads, heads):
                for row in range(0, run.length, rows):
                    stop = min(cell + cells, run.cells)
                    yield Block(run, first_cell, slice(cell, stop), slice(head, head + heads), slice(row, row + rows))
        first_cell += run.cells


def times(x: Tensor, weight: Tensor) -> Tensor:
    """Return x (b, c, k) times the transpose of weight, (n, k) or (b, n, k); float32 on a CPU runs in oneDNN."""
    if onednn is None or x.dtype != torch.float32 or x.device.type != "cpu":
        return x @ weight.mT
    if weight.dim() == 2:
        return onednn(x.flatten(0, 1), weight, None, "none", [], "").unflatten(0, x.shape[:2])
    if len(x) == 1:
        return onednn(x[0], weight[0], None, "none", [], "").unsqueeze(0)
    return torch.stack([onednn(mine, other, None, "none", [], "") for mine, other in zip(x, weight, strict=True)])


def read(e: Tensor, b: Tensor, eps: float) -> Tensor:
    """Return phi B; features (b, c, m), B transposed (b, n, m) -> (b, c, n)."""
    return times(e, b).add_(b.sum(-1).unsqueeze(-2), alpha=eps)


def with_column(x: Tensor, column: Tensor) -> Tensor:
    """Return x (b, c, d) and one more column (b, c)."""
    return torch.cat([x, column.unsqueeze(-1)], -1)


class Gathered:
    """What a pass over the blocks sums up per cell and head: phi^T A, transposed, (N, H, a, m)."""

    def __init__(self, like: Tensor, n_cells: int, n_heads: int, a: int, m: int) -> None:
        self.sums = like.new_zeros(n_cells, n_heads, a, m)
        self.totals = like.new_zeros(n_cells, n_heads, a)

    def add(self, block: Block, e: Tensor, a: Tensor) -> None:
        sums, totals = block.of_cells(self.sums), block.of_cells(self.totals)
        sums += times(a.mT, e.mT).view(sums.shape)
        totals += a.sum(-2).view(totals.shape)

    def with_eps(self, eps: float) -> Tensor:
        return self.sums.add_(self.totals.unsqueeze(-1), alpha=eps)


# ---------------------------------------------------------------------------------------------------------------------
# features


@dataclass(frozen=True)
class FeatureMap:
    """phi of vectors (b, c, d): a kernel of their projections (b, c, m), and eps.

    Attributes:
        kernel: exp, relu or elu; elu is elu + 1, and projects nothing.
        weight: (m, d) the projection, d^(-1/4) folded in; (0, d) for elu.
        compat: as scBERT's release; see `scfm.model.performer`.
    """

    kernel: str
    weight: Tensor
    compat: bool

    @classmethod
    def of(cls, kernel: str, projection: Tensor, compat: bool, dtype: torch.dtype) -> FeatureMap:
        return cls(kernel, projection.to(dtype) * projection.shape[1] ** -0.25, compat)

    @property
    def m(self) -> int:
        """The number of features."""
        return self.weight.shape[1] if self.kernel == "elu" else self.weight.shape[0]

    @property
    def eps(self) -> tuple[float, float]:
        """What E of queries and of keys lacks; queries need none where their largest feature is 1."""
        if self.kernel == "exp":
            return (COMPAT_EPS, COMPAT_EPS) if self.compat else (0.0, EPS)
        return 0.0, 0.0

    @property
    def moving_peaks(self) -> bool:
        """Whether a gradient flows through the stabilisers."""
        return self.kernel == "exp" and self.compat

    def exponent(self, x: Tensor) -> Tensor:
        """Return w y in units of log 2; where x has one more column, that is added."""
        weight = self.weight * LOG2E
        return times(x, weight if x.shape[-1] == weight.shape[-1] else F.pad(weight, (0, 1), value=1.0))

    def norm(self, x: Tensor) -> Tensor:
        """Return |y|^2 / 2, (b, c), in units of log 2."""
        return x.square().sum(-1) * (0.5 * LOG2E * x.shape[-1] ** -0.5)

    def norm_gradient(self, x: Tensor) -> Tensor:
        """Return the gradient of |y|^2 / 2 in natural units, (b, c, d)."""
        return x * x.shape[-1] ** -0.5

    def activated(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return projections and features, of the kernels without exp."""
        p = x if self.kernel == "elu" else times(x, self.weight)
        return p, ACTIVATIONS[self.kernel](p)

    def of_queries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of queries, and what their exponents hold beside w y, (b, c)."""
        if self.kernel != "exp":
            return self.activated(x)[1], x.new_zeros(x.shape[:2])
        p = self.exponent(x)
        row = -p.amax(-1)
        if self.compat:
            row -= self.norm(x)
        return p.add_(row.unsqueeze(-1)).exp2_(), row

    def again(self, x: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Return projections, which the backward of relu and elu needs, and features; row: of the forward."""
        if self.kernel != "exp":
            return self.activated(x)
        e = self.exponent(with_column(x, row)).exp2_()
        return e, e

    def pulled(self, p: Tensor, e: Tensor, d_phi: Tensor) -> Tensor:
        """Return the gradient of the projections, for exp of the whole exponent; d_phi may be overwritten."""
        if self.kernel == "exp":
            return d_phi.mul_(e)
        if self.kernel == "relu":
            return aten.threshold_backward(d_phi, p, 0)
        return aten.elu_backward(d_phi, 1, 1, 1, False, p)

    def unprojected(self, d_p: Tensor) -> Tensor:
        return d_p if self.kernel == "elu" else times(d_p, self.weight.t())


class KeyPass:
    """The features of a pack's keys, block after block, under a stabiliser that is not known before the last.

    Attributes:
        gathered: phi^T A.
        peaks: (N, H) the stabiliser so far.
        norms: (T, H) |y|^2 / 2 of each key; infinite for a masked one.
        tops: (T, H) the largest w y of each key.
    """

    def __init__(self, phi: FeatureMap, k: Tensor, n_cells: int, a: int) -> None:
        n_tokens, n_heads, _ = k.shape
        like = k.new_empty(0, dtype=exact(k.dtype))
        self.phi = phi
        self.gathered = Gathered(like, n_cells, n_heads, a, phi.m)
        self.peaks = like.new_full((n_cells, n_heads), torch.finfo(like.dtype).min)
        self.norms, self.tops = like.new_zeros(2, n_tokens, n_heads).unbind()

    def add(self, block: Block, x: Tensor, a: Tensor, kept: Tensor | None) -> None:
        """Gather the values a (b, c, a) of keys x (b, c, d)."""
        phi = self.phi
        if phi.kernel != "exp":
            self.gathered.add(block, phi.activated(x)[1], a)
            return
        p, norm = phi.exponent(x), phi.norm(x)
        top = p.amax(-1)
        if kept is not None:
            norm = norm.masked_fill(~kept, torch.inf)
        block.put(self.norms, norm)
        block.put(self.tops, top)
        peak = block.of_cells(self.peaks)
        level = top if phi.compat else top - norm
        higher = torch.maximum(peak, level.amax(-1).view(peak.shape))
        block.of_cells(self.gathered.sums).mul_((peak - higher).exp2()[..., None, None])
        peak.copy_(higher)
        e = p.sub_((norm + higher.view(-1, 1)).unsqueeze(-1)).exp2_()
        self.gathered.add(block, e, a)

    def finish(self, runs: list[Run]) -> tuple[Tensor, Tensor, Tensor]:
        """Return phi^T A, what the keys' exponents hold beside w y (T, H), and where the largest w y is."""
        if self.phi.moving_peaks:
            peak = self.peaks.amax()
            self.gathered.sums.mul_((self.peaks - peak).exp2()[..., None, None])
            self.peaks.fill_(peak)
        first = 0
        for run in runs:
            run.heads_first(self.norms).add_(self.peaks[first : first + run.cells].unsqueeze(-1))
            first += run.cells
        return self.gathered.with_eps(self.phi.eps[1]), -self.norms, self.tops.flatten().argmax()


def values_of(block: Block, v: Tensor, kept: Tensor | None, compat: bool) -> Tensor:
    """Return [v, 1] of a block, (b, c, d + 1), without what is masked; compat keeps its ones."""
    values = F.pad(block.take(v, exact(v.dtype)), (0, 1), value=1.0)
    if kept is not None:
        (values[..., :-1] if compat else values).mul_(kept.unsqueeze(-1))
    return values


def taken(block: Block, key_mask: Tensor | None, n_heads: int) -> Tensor | None:
    """Return the block's part of a mask (T,), (b, c)."""
    return None if key_mask is None else block.take(key_mask[:, None].expand(-1, n_heads), torch.bool)
