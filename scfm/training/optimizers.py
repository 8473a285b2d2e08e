"""Optimisers and learning-rate schedules, by registered name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from scfm.errors import ScfmError
from scfm.model.mixer_block import MixerBlock
from scfm.model.transformer import Block
from scfm.recipe import OptimizerConfig
from scfm.training.muon import JoinedOptimizer, StackedMuon


def build_optimizer(network: nn.Module, config: OptimizerConfig, *, fused: bool) -> Optimizer:
    """Return the optimiser over the trainable parameters; decay acts on matrices other than embeddings.

    Args:
        network: its parameters with `requires_grad` are trained.
        config: the recipe's optimizer section.
        fused: one kernel for all tensors of AdamW; not under a gradient scaler, which would unscale only inside that
            kernel, after the clipping.
    """
    if config.name not in OPTIMIZERS:
        raise ScfmError(f"optimizer.name: {config.name!r} is not known; choose one of {sorted(OPTIMIZERS)}")
    return OPTIMIZERS[config.name](network, config, fused)


def adamw(network: nn.Module, config: OptimizerConfig, fused: bool) -> Optimizer:
    """Return AdamW for all parameters."""
    return torch.optim.AdamW(adamw_groups(network, config), **adamw_options(config, fused))


def muon(network: nn.Module, config: OptimizerConfig, fused: bool) -> Optimizer:
    """Return Muon for the matrices of the transformer blocks, and AdamW for all else.

    Muon's updates are scaled to the size of AdamW's (Liu et al. 2025), so that one learning rate and decay serve both.
    """
    blocks = [module for module in network.modules() if isinstance(module, Block | MixerBlock)]
    matrices = [p for block in blocks for p in block.parameters() if p.ndim == 2 and p.requires_grad]
    if not matrices:
        raise ScfmError("optimizer.name: muon trains the matrices of transformer blocks, of which none is trainable")
    stacked = {id(block.qkv.weight): 3 for block in blocks}
    stacked |= {id(block.linear1.weight): 2 for block in blocks if isinstance(block, MixerBlock) and block.glu}
    groups = [
        {"params": [p for p in matrices if stacked.get(id(p), 1) == number], "stacked": number} for number in (3, 2, 1)
    ]
    turning = StackedMuon(
        [group for group in groups if group["params"]],
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    rest = adamw_groups(network, config, without=matrices)
    return JoinedOptimizer([turning, *([torch.optim.AdamW(rest, **adamw_options(config, fused))] if rest else [])])


OPTIMIZERS: dict[str, Callable[[nn.Module, OptimizerConfig, bool], Optimizer]] = {"adamw": adamw, "muon": muon}


def adamw_groups(network: nn.Module, config: OptimizerConfig, without: Sequence[Tensor] = ()) -> list[dict[str, Any]]:
    """Return the trainable parameters, but for some, as a group that decays and one that is spared."""
    left_out = {id(parameter) for parameter in without}
    embeddings = {
        id(parameter)
        for module in network.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    trained = [p for p in network.parameters() if p.requires_grad and id(p) not in left_out]
    decays = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    spared = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    groups = [{"params": decays, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw_options(config: OptimizerConfig, fused: bool) -> dict[str, Any]:
    """Return what AdamW takes from the recipe, decay aside."""
    return {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": fused}


def learning_rate_factor(config: OptimizerConfig, total_steps: int, epoch_steps: float) -> Callable[[int], float]:
    """Return step -> factor of the peak rate.

    A linear warm-up from zero, then cosine to zero, or constant; or cycles of both, which change with the epoch only.

    Args:
        config: the recipe's optimizer section.
        total_steps: optimizer steps of the run.
        epoch_steps: optimizer steps of an epoch; infinite where the data never end.
    """
    if config.schedule == "cosine_restarts":
        return lambda step: restarts(config, int(step // epoch_steps)) / config.lr
    warmup = config.warmup if config.warmup >= 1 else config.warmup * total_steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.schedule == "constant":
            return 1.0
        progress = (step - warmup) / max(1.0, total_steps - warmup)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    return factor


def restarts(config: OptimizerConfig, epoch: int) -> float:
    """Return the learning rate of an epoch under cosine_restarts: warm restarts, each after a warm-up.

    Source: Loshchilov and Hutter, "SGDR", ICLR 2017; with the warm-up and the decay of scBERT's released code. Its
    first epoch, the whole of it, runs at `min_lr`, as there.
    """
    warmup, length, peak = int(config.warmup), config.cycle_epochs, config.lr
    while epoch >= length:
        epoch -= length
        length = int((length - warmup) * config.cycle_growth) + warmup
        peak *= config.cycle_decay
    peak = max(peak, config.min_lr)
    if epoch < warmup:
        return config.min_lr + (peak - config.min_lr) * epoch / warmup
    progress = (epoch - warmup) / (length - warmup)
    return config.min_lr + 0.5 * (peak - config.min_lr) * (1.0 + math.cos(math.pi * progress))


def build_schedule(optimizer: Optimizer, config: OptimizerConfig, total_steps: int, epoch_steps: float) -> LambdaLR:
    """Return the schedule, stepped once per optimizer step; the arguments are those of `learning_rate_factor`."""
    return LambdaLR(optimizer, learning_rate_factor(config, total_steps, epoch_steps))
