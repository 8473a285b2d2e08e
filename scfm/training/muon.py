"""Muon for the matrices of the transformer blocks (Jordan et al. 2024), joined with AdamW for all else."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class StackedMuon(torch.optim.Muon):
    """torch's Muon for parameters that are matrices on top of each other, each orthogonalised by itself.

    `stacked` of a group says how many: the joint projection (3D, D) of q, k and v holds 3. torch's Muon would make one
    orthogonal matrix of the three, in which the size of one's update hangs on the others. Its own step is used as it
    is; only what it gathers to work on (`_init_group`) is cut into views, so that the state stays one momentum buffer
    to a parameter.

    As fused AdamW does, it takes `found_inf`, a number on the device: where that is 1, a step changes nothing.
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if self.found_inf is None:
            return super().step(closure)
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p in moved:
            self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.grad))
        tensors = [tensor for p in moved for tensor in (p.data, self.state[p]["momentum_buffer"])]
        before = [tensor.clone() for tensor in tensors]
        result = super().step(closure)
        for tensor, former in zip(tensors, before, strict=True):
            tensor.copy_(torch.where(self.found_inf > 0, former, tensor))
        return result

    def _init_group(self, group: MutableMapping[str, Any], *gathered: list[Tensor]) -> bool:
        whole: list[list[Tensor]] = [[] for _ in gathered]  # parameters, gradients, momentum buffers
        is_complex = super()._init_group(group, *whole)
        for pieces, tensors in zip(gathered, whole, strict=True):
            pieces += [piece for tensor in tensors for piece in tensor.chunk(group["stacked"])]
        return is_complex


class JoinedOptimizer(Optimizer):
    """Several optimizers as one: a schedule, the clipping, a gradient scaler and a checkpoint see all their groups.

    The groups and the state are the parts' own objects, shared rather than copied.

    Args:
        parts: optimizers without a parameter in common.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = list(parts)
        self.share()

    def share(self) -> None:
        """Give the parts the groups and the state that this optimizer holds."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.share()  # torch puts new objects in place of the old ones

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure once (Lightning clips in it), then let every part move its parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss
