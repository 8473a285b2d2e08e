"""Input norms over a whole global batch: the same statistics, and the same gradient, whatever the packs and processes.

Mean and variance of a domain join all its tokens of a global batch, which lie in several packs and on several ranks.
They are measured in a first pass over the embedded tokens, which costs little beside the transformer. The packs then
take them as given and collect the gradient at them, g; a last pass over the embedded tokens x hands it down: with n
tokens of a domain, mean m and variance v,

    d loss / d x  =  (what the packs' own backward gave)  +  g_m / n  +  2 g_v (x - m) / n
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from scfm.data.batch import PackedBatch
from scfm.model.scgpt import Backbone


class GlobalNorm:
    """Statistics of a global batch for a backbone's input norm.

    Args:
        backbone: in training mode, with an input norm.
        packs: this rank's packs.
        draw: called with a pack's index before it is embedded, so that dropout draws the same numbers in every pass.
    """

    def __init__(self, backbone: Backbone, packs: Sequence[PackedBatch], draw: Callable[[int], None]) -> None:
        assert backbone.input_norm is not None
        self.backbone, self.packs, self.draw, self.norm = backbone, packs, draw, backbone.input_norm
        sums, squares = (torch.zeros_like(self.norm.running_mean, dtype=torch.float64) for _ in range(2))  # (K, D)
        total = sums.new_zeros(len(sums), 1)  # (K, 1)
        with torch.no_grad():
            for index in range(len(packs)):
                x, domain, counted = self.embedded(index)
                for table, values in ((total, torch.ones_like(x[:, :1])), (sums, x), (squares, x.square())):
                    table.index_add_(0, domain, values.double() * counted[:, None])
        for table in (total, sums, squares):
            sum_over_ranks(table)
        self.present, self.total = total > 0, total.clamp(min=1)
        mean = sums / self.total
        var = (squares / self.total - mean.square()).clamp(min=0)
        kind = self.norm.running_mean.dtype
        self.mean = torch.where(self.present, mean.to(kind), self.norm.running_mean).requires_grad_()
        self.var = torch.where(self.present, var.to(kind), self.norm.running_var).requires_grad_()

    def embedded(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tokens of a pack before the norm, (T, D), their domains (T,), and (T,) 1 for those that count."""
        self.draw(index)
        x, domain, counted = self.backbone.before_norm(self.packs[index])
        counted = counted & (domain >= 0)
        return x.to(self.norm.running_mean.dtype), domain.clamp(min=0), counted.double()

    def learn(self) -> None:
        """Move the running averages by these statistics."""
        self.norm.learn(self.mean.detach(), self.var.detach(), self.total.to(self.mean.dtype), self.present[:, 0])

    def gather_gradient(self) -> None:
        """Sum the gradient at the statistics over the ranks; call it after the packs' backward, before `pull`."""
        for leaf in (self.mean, self.var):
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            sum_over_ranks(leaf.grad)

    def pull(self, index: int) -> Tensor:
        """Return a scalar whose gradient is what reaches a pack's embedded tokens through the statistics."""
        x, domain, counted = self.embedded(index)
        assert self.mean.grad is not None
        assert self.var.grad is not None
        share = (counted[:, None] / self.total[domain]).to(x.dtype)
        off = x - self.mean.detach()[domain]
        return (share * (self.mean.grad[domain] * x + self.var.grad[domain] * off.square())).sum()


def sum_over_ranks(table: Tensor) -> None:
    """Sum a tensor over the ranks, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(table)
