"""Learning rates and decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scfm.errors import ScfmError
from scfm.recipe import OptimizerConfig
from scfm.training.optimizers import build_optimizer, learning_rate_factor


def test_warm_up_then_cosine_to_zero() -> None:
    factor = learning_rate_factor(OptimizerConfig(warmup=10), total_steps=110)
    assert [factor(step) for step in (0, 9, 10)] == pytest.approx([1 / 11, 10 / 11, 1])
    assert factor(60) == pytest.approx(0.5)
    assert factor(110) == pytest.approx(0)


def test_a_warm_up_below_one_is_a_share_of_all_steps() -> None:
    shared = learning_rate_factor(OptimizerConfig(warmup=0.1), total_steps=100)
    counted = learning_rate_factor(OptimizerConfig(warmup=10), total_steps=100)
    assert [shared(step) for step in range(100)] == [counted(step) for step in range(100)]


def test_a_constant_rate_stays() -> None:
    factor = learning_rate_factor(OptimizerConfig(schedule="constant"), total_steps=10)
    assert {factor(step) for step in range(10)} == {1.0}


def test_decay_spares_biases_norms_and_embeddings() -> None:
    network = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    decays, spared = build_optimizer(network, OptimizerConfig(weight_decay=0.1), fused=True).param_groups
    assert [tuple(p.shape) for p in decays["params"]] == [(3, 4)]
    assert decays["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0
    assert sum(p.numel() for p in spared["params"]) == 28 + 3 + 6


def test_frozen_parameters_are_not_optimised() -> None:
    network = nn.Linear(2, 2)
    network.weight.requires_grad = False
    (group,) = build_optimizer(network, OptimizerConfig(), fused=False).param_groups
    assert [p is network.bias for p in group["params"]] == [True]


def test_adamw_without_decay_is_adam() -> None:
    networks = [nn.Linear(3, 3, dtype=torch.float64) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    ours = build_optimizer(networks[0], OptimizerConfig(lr=0.1), fused=False)
    adam = torch.optim.Adam(networks[1].parameters(), lr=0.1)
    for _ in range(5):
        for network, optimizer in zip(networks, (ours, adam), strict=True):
            optimizer.zero_grad()
            network(torch.ones(2, 3, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(networks[0].weight, networks[1].weight)


def test_an_unknown_optimizer_is_named() -> None:
    with pytest.raises(ScfmError, match=r"optimizer\.name: 'lion' is not known"):
        build_optimizer(nn.Linear(1, 1), OptimizerConfig(name="lion"), fused=False)
