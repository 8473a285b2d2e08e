"""Batch norm of the embedded tokens, over all cells or over the cells of each domain (DSBN)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS = 6.1e-5  # scGPT's, the smallest normal float16
MOMENTUM = 0.1


class InputNorm(nn.Module):
    """Subtracts the mean and divides by the standard deviation of a token's domain: (T, D) -> (T, D).

    In training both come from the tokens of the pack, each domain's from its own, or are given (`given`: mean and
    variance of a whole global batch); else from running averages. A token of an unknown domain (-1) gets those of all
    domains together. With one domain and `affine` this is a plain
    batch norm; without `affine` it is domain-specific batch norm as in scGPT (Chang et al., CVPR 2019).

    Args:
        width: D.
        n_domains: K.
        affine: whether a learned scale and shift follow.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, width: int, n_domains: int, affine: bool) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(n_domains, width))
        self.register_buffer("running_var", torch.ones(n_domains, width))
        self.register_buffer("num_batches_tracked", torch.zeros(n_domains, dtype=torch.int64))
        self.given: tuple[Tensor, Tensor] | None = None
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor, domain: Tensor, counted: Tensor) -> Tensor:
        """Norm tokens.

        Args:
            x: (T, D).
            domain: (T,) index of each token's domain, -1 for an unknown one.
            counted: (T,) how often each token counts in the statistics; 0 leaves it out.
        """
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = self.given or self.statistics(exact, domain, counted)
        # index -1 finds the last row: that of all domains together
        means = torch.cat([mean, mean.mean(0, keepdim=True)])
        variances = torch.cat([var, (var.mean(0) + mean.var(0, unbiased=False))[None]])
        normed = (exact - means[domain]) * (variances[domain] + EPS).rsqrt()
        if self.weight is not None and self.bias is not None:
            normed = normed * self.weight + self.bias
        return normed.to(x.dtype)

    def learn(self, mean: Tensor, var: Tensor, total: Tensor, present: Tensor) -> None:
        """Move the running averages of the domains that are present, (K,), by their statistics of `total` tokens."""
        with torch.no_grad():
            rate = MOMENTUM * present[:, None].to(mean.dtype)
            self.running_mean.add_(rate * (mean - self.running_mean))
            self.running_var.add_(rate * (var * total / (total - 1).clamp(min=1) - self.running_var))
            self.num_batches_tracked.add_(present.long())

    def statistics(self, x: Tensor, domain: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of each domain, (K, D) each: those of the pack where it holds the domain."""
        counted = counted.to(x.dtype) * (domain >= 0)
        place, n_domains = domain.clamp(min=0), len(self.running_mean)
        total = x.new_zeros(n_domains).index_add(0, place, counted)[:, None]  # (K, 1)

        def average(values: Tensor) -> Tensor:
            return x.new_zeros(self.running_mean.shape).index_add(0, place, values * counted[:, None]) / total.clamp(
                min=1
            )

        mean = average(x)
        var = average((x - mean[place]).square())
        present = total > 0
        if torch.is_grad_enabled():  # a pass without a graph repeats one that learns
            self.learn(mean.detach(), var.detach(), total, present[:, 0])
        return torch.where(present, mean, self.running_mean), torch.where(present, var, self.running_var)
