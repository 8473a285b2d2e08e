"""The fast CPU layers mean what torch's layers mean."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scfm.errors import ScfmError
from scfm.model.layers import Dropout, Linear


@pytest.mark.parametrize("rows", [0, 1, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_torch(rows: int, bias: bool) -> None:
    """Forward and all gradients in float32, an empty batch included."""
    ours = Linear(24, 40, bias=bias)
    theirs = nn.Linear(24, 40, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(rows, 24, generator=torch.Generator().manual_seed(0))
    results = []
    for layer in (ours, theirs):
        input = x.clone().requires_grad_()
        out = layer(input)
        out.square().sum().backward()
        results.append([out, input.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_linear_follows_autocast() -> None:
    layer = Linear(8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_dropout_keeps_the_share_and_the_mean(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 1001)
    dropped = Dropout(p).train()(x)
    kept = dropped != 0
    n = x.numel()
    spread = (p * (1 - p) / n) ** 0.5
    assert abs(float(kept.double().mean()) - (1 - p)) < 5 * spread
    torch.testing.assert_close(dropped[kept].unique(), torch.tensor([1 / (1 - p)]), rtol=1e-4, atol=0)
    # elements of one 64-bit draw are independent: neighbours are kept together as often as chance has it
    together = (kept[:, :-1] & kept[:, 1:]).double().mean()
    assert abs(float(together) - (1 - p) ** 2) < 8 * spread


def test_dropout_gradient_uses_the_same_mask() -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(50, 7, requires_grad=True), torch.randn(50, 7, requires_grad=True)
    out = Dropout(0.3).train()(x, residual=residual)
    grad_x, grad_residual = torch.autograd.grad(out.sum(), (x, residual))
    torch.testing.assert_close(out, residual + grad_x * x)
    assert torch.equal(grad_residual, torch.ones_like(residual))
    assert 0 < float((grad_x == 0).float().mean()) < 1


def test_dropout_is_seeded_and_off_in_evaluation() -> None:
    x, layer = torch.randn(64, 8), Dropout(0.5)
    torch.manual_seed(3)
    first = layer.train()(x)
    second = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(layer(x, residual=x), x + x)


def test_dropout_of_everything_is_refused() -> None:
    with pytest.raises(ScfmError, match=r"model.dropout: 1.0 must lie in \[0, 1\)"):
        Dropout(1.0)


def test_torch_is_used_for_other_types() -> None:
    layer, x = Linear(8, 4).double(), torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
