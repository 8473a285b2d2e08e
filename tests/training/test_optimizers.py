"""Learning rates and decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from scfm.errors import ScfmError
from scfm.recipe import OptimizerConfig
from scfm.training.optimizers import build_optimizer, learning_rate_factor


def test_warm_up_then_cosine_to_zero() -> None:
    factor = learning_rate_factor(OptimizerConfig(warmup=10), total_steps=110, epoch_steps=11)
    assert [factor(step) for step in (0, 9, 10)] == pytest.approx([1 / 11, 10 / 11, 1])
    assert factor(60) == pytest.approx(0.5)
    assert factor(110) == pytest.approx(0)


def test_a_warm_up_below_one_is_a_share_of_all_steps() -> None:
    shared = learning_rate_factor(OptimizerConfig(warmup=0.1), total_steps=100, epoch_steps=10)
    counted = learning_rate_factor(OptimizerConfig(warmup=10), total_steps=100, epoch_steps=10)
    assert [shared(step) for step in range(100)] == [counted(step) for step in range(100)]


def test_a_constant_rate_stays() -> None:
    factor = learning_rate_factor(OptimizerConfig(schedule="constant"), total_steps=10, epoch_steps=5)
    assert {factor(step) for step in range(10)} == {1.0}


def test_cycles_restart_at_whole_epochs_lower_and_longer() -> None:
    config = OptimizerConfig(
        lr=1.0, warmup=1, schedule="cosine_restarts", cycle_epochs=3, cycle_growth=2.0, cycle_decay=0.5, min_lr=0.2
    )
    factor = learning_rate_factor(config, total_steps=1000, epoch_steps=4)
    assert [factor(step) for step in range(0, 12 * 4, 4)] == pytest.approx(
        [
            *(0.2, 1.0, 0.6),  # a warm-up of one epoch, a cosine of two
            *(0.2, 0.5, 0.2 + 0.15 * (1 + 2**-0.5), 0.35, 0.2 + 0.15 * (1 - 2**-0.5)),  # one of four
            *(0.2, 0.25, 0.2 + 0.025 * (1 + math.cos(math.pi / 8)), 0.2 + 0.025 * (1 + 2**-0.5)),  # one of eight
        ]
    )
    assert all(factor(4 * (step // 4)) == factor(step) for step in range(48))


def test_a_cycle_never_peaks_below_its_lowest_rate() -> None:
    config = OptimizerConfig(
        lr=1.0, schedule="cosine_restarts", cycle_epochs=2, cycle_growth=1.0, cycle_decay=0.1, min_lr=0.5
    )
    factor = learning_rate_factor(config, total_steps=10, epoch_steps=1)
    assert [factor(step) for step in range(6)] == pytest.approx([1, 0.75, 0.5, 0.5, 0.5, 0.5])


def test_data_that_never_end_are_one_epoch() -> None:
    config = OptimizerConfig(lr=1.0, schedule="cosine_restarts", cycle_epochs=2, min_lr=0.5)
    assert learning_rate_factor(config, total_steps=10, epoch_steps=math.inf)(9) == 1.0


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
