"""Batch norm by domain beside torch's own, one norm per domain."""

from __future__ import annotations

import pytest
import torch
from packs import random_pack
from torch import nn

from scfm.model.input_norm import EPS, InputNorm

DOMAIN = torch.tensor([0, 2, 0, 0, 2, 2, 0, 2, 0])  # domain 1 does not occur
PLACES = {k: (k == DOMAIN).nonzero()[:, 0] for k in (0, 2)}
ALL = torch.ones(9)


def norms_of_torch(n_domains: int = 3, width: int = 4) -> nn.ModuleList:
    return nn.ModuleList(nn.BatchNorm1d(width, eps=EPS, affine=False) for _ in range(n_domains))


def test_each_domain_is_normed_as_if_it_were_alone() -> None:
    torch.manual_seed(0)
    ours, theirs = InputNorm(4, 3, affine=False).double(), norms_of_torch().double()
    for _ in range(3):
        x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
        again = x.detach().clone().requires_grad_()
        expected = torch.empty_like(x)
        for k, places in PLACES.items():
            expected = expected.index_copy(0, places, theirs[k](again[places]))
        mine, pull = ours(x, DOMAIN, ALL), torch.randn(9, 4, dtype=torch.float64)
        torch.testing.assert_close(mine, expected)
        gradient, wanted = (
            torch.autograd.grad((mine * pull).sum(), x),
            torch.autograd.grad((expected * pull).sum(), again),
        )
        torch.testing.assert_close(gradient, wanted)
    torch.testing.assert_close(ours.running_mean, torch.stack([norm.running_mean for norm in theirs]))
    torch.testing.assert_close(ours.running_var, torch.stack([norm.running_var for norm in theirs]))
    assert ours.num_batches_tracked.tolist() == [3, 0, 3]
    x = torch.randn(9, 4, dtype=torch.float64)
    expected = torch.stack([theirs.eval()[k](row[None])[0] for k, row in zip(DOMAIN.tolist(), x, strict=True)])
    torch.testing.assert_close(ours.eval()(x, DOMAIN, ALL), expected)


def test_one_affine_domain_is_a_batch_norm() -> None:
    torch.manual_seed(0)
    ours, theirs = InputNorm(4, 1, affine=True), nn.BatchNorm1d(4, eps=EPS)
    for norm in (ours, theirs):
        nn.init.constant_(norm.weight, 1.5)
        nn.init.constant_(norm.bias, -0.5)
    x = torch.randn(9, 4)
    torch.testing.assert_close(ours(x, torch.zeros(9, dtype=torch.long), ALL), theirs(x))
    torch.testing.assert_close(ours.running_var[0], theirs.running_var)


def test_tokens_count_as_often_as_they_are_said_to() -> None:
    x = torch.randn(4, 3)
    often = torch.tensor([1.0, 0.0, 3.0, 1.0])
    repeated = x[[0, 2, 2, 2, 3]]
    one = torch.zeros(4, dtype=torch.long)
    ours, theirs = InputNorm(3, 1, affine=False), nn.BatchNorm1d(3, eps=EPS, affine=False)
    torch.testing.assert_close(ours(x, one, often)[[0, 2, 2, 2, 3]], theirs(repeated))
    torch.testing.assert_close(ours.running_var[0], theirs.running_var)


def test_an_unknown_domain_gets_the_statistics_of_all_together() -> None:
    norm = InputNorm(2, 2, affine=False).eval()
    norm.running_mean.copy_(torch.tensor([[0.0, 1.0], [4.0, 1.0]]))
    norm.running_var.copy_(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    x = torch.tensor([[2.0, 1.0], [4.0, 3.0]])
    # mixture of two equal parts: mean (2, 1), variance (mean 2 + between 4, mean 2 + between 0)
    expected = (x - torch.tensor([2.0, 1.0])) / (torch.tensor([6.0, 2.0]) + EPS).sqrt()
    torch.testing.assert_close(norm(x, torch.tensor([-1, -1]), torch.ones(2)), expected)


def test_only_passes_that_learn_move_the_averages() -> None:
    norm = InputNorm(4, 3, affine=False)
    with torch.no_grad():
        norm(torch.randn(9, 4), DOMAIN, ALL)
    assert norm.num_batches_tracked.tolist() == [0, 0, 0]
    assert norm.running_mean.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_taken_in_float32(dtype: torch.dtype) -> None:
    """float16 squares overflow and bfloat16 sums lose the small terms; only the result has the input's type."""
    x = torch.randn(9, 4).mul(300).to(dtype)
    half = InputNorm(4, 3, affine=False)(x, DOMAIN, ALL)
    assert half.dtype == dtype
    torch.testing.assert_close(
        half.float(), InputNorm(4, 3, affine=False)(x.float(), DOMAIN, ALL), rtol=1e-2, atol=1e-2
    )


def test_padding_is_one_token_per_cell_that_counts_as_often_as_it_stands_there() -> None:
    from scfm.model.padding import PAD_VALUE, Padded

    batch = random_pack([5, 2, 4], [5, 2, 4], gene_conditions={"perturbation": torch.ones(11, dtype=torch.long)})
    padded = Padded.of(batch, pad=77)
    assert padded.batch.lengths.tolist() == [6, 3, 5]
    ends = (padded.batch.cu_seqlens[1:] - 1).long()
    assert padded.counted[ends].tolist() == [0, 3, 1]
    assert (padded.batch.genes[ends] == 77).all()
    assert (padded.batch.values[ends] == PAD_VALUE).all()
    assert padded.batch.gene_conditions["perturbation"][ends].tolist() == [0, 0, 0]
    for name in ("genes", "values"):
        assert torch.equal(getattr(padded.batch, name)[padded.own], getattr(batch, name))
    assert (padded.counted[padded.own] == 1).all()
