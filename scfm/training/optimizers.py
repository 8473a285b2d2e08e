"""Optimisers and learning-rate schedules, by registered name."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from scfm.errors import ScfmError
from scfm.recipe import OptimizerConfig

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW}


def build_optimizer(network: nn.Module, config: OptimizerConfig, *, fused: bool) -> torch.optim.Optimizer:
    """Return the optimiser over the trainable parameters; decay acts on matrices other than embeddings.

    Args:
        network: its parameters with `requires_grad` are trained.
        config: the recipe's optimizer section.
        fused: one kernel for all tensors; not under a gradient scaler, which would unscale only inside that kernel,
            after the clipping.
    """
    if config.name not in OPTIMIZERS:
        raise ScfmError(f"optimizer.name: {config.name!r} is not known; choose one of {sorted(OPTIMIZERS)}")
    embeddings = {
        id(parameter)
        for module in network.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    decays = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    spared = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    groups = [{"params": decays, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return OPTIMIZERS[config.name](
        [group for group in groups if group["params"]],
        lr=config.lr,  # type: ignore[call-arg]
        betas=config.betas,
        eps=config.eps,
        fused=fused,
    )


def learning_rate_factor(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """Return step -> factor of the peak rate: a linear warm-up from zero, then cosine to zero, or constant."""
    warmup = config.warmup if config.warmup >= 1 else config.warmup * total_steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.schedule == "constant":
            return 1.0
        progress = (step - warmup) / max(1.0, total_steps - warmup)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    return factor


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig, total_steps: int) -> LambdaLR:
    """Return the schedule, stepped once per optimizer step."""
    return LambdaLR(optimizer, learning_rate_factor(config, total_steps))
