"""FSDP2: weights, gradients and optimizer states cut over the processes, each holding its part of every tensor.

Lightning's ModelParallelStrategy starts the processes and makes the mesh; torch's `fully_shard` cuts the model. What is
ours is the form of a checkpoint: whole tensors in the order of DDP's, so that a run goes on under either, on any number
of processes.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from scfm.errors import ScfmError
from scfm.recipe import Recipe


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes of a run, in one row; `start_method` fork starts them in milliseconds (CPUs, tests)."""

    def __init__(self, start_method: str = "popen") -> None:
        super().__init__(save_distributed_checkpoint=False)
        self.start_method = start_method
        self.form: nn.Module | None = None  # of the network before it was cut, without its weights

    def _configure_launcher(self) -> None:
        if self.start_method == "fork":
            self._launcher = _MultiProcessingLauncher(self, start_method="fork")
        else:
            super()._configure_launcher()

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def cut(self, network: nn.Module) -> None:
        """Cut a network over the processes, in place.

        Each block is gathered for its own pass and given up after it; embeddings and heads stay for the whole of a
        pass. Under mixed precision blocks are gathered in bf16, as autocast would cast them; gradients are summed in
        float32.
        """
        if self.form is not None:
            return
        bare: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in network.parameters()}
        self.form = copy.deepcopy(network, bare)
        mesh = self.device_mesh["data_parallel"]
        precision = str(self.precision_plugin.precision)
        # autocast chooses the types of what flows between blocks
        of_blocks = MixedPrecisionPolicy(cast_forward_inputs=False)
        if precision.startswith("bf16"):
            gathered_in = torch.bfloat16 if precision == "bf16-mixed" else None
            of_blocks = MixedPrecisionPolicy(gathered_in, torch.float32, cast_forward_inputs=False)
        backbone: Any = network.backbone
        for block in backbone.blocks:
            fully_shard(block, mesh=mesh, mp_policy=of_blocks)
        # a gene's gradient sums over thousands of tokens: embeddings, norms and heads keep the precision they have
        fully_shard(network, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))

    def joined(self, network: nn.Module) -> nn.Module:
        """Return a network that was cut as a plain one on the CPU; all processes call it, the first gets weights."""
        assert self.form is not None
        weights, form = whole(network.state_dict(), keep=self.is_global_zero), self.form
        if self.is_global_zero:
            form.load_state_dict(weights, assign=True)  # in the precision that they have by now
        return form

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Keep the gradients of a backward whole and on this process, to be summed with those of the next."""
        network = cast(FSDPModule, self.lightning_module.network)  # type: ignore[union-attr]
        network.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            network.set_requires_gradient_sync(True)

    # A checkpoint is read and written as that of one process; only tensors are gathered before and cut after.

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return whole(self.lightning_module.state_dict(), keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return whole(optimizer.state_dict(), keep=self.is_global_zero)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        # Lightning forgets to hand on what the trainer was told where a checkpoint is restored after the setup
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        places = self.lightning_module.state_dict()
        cut = {name: cut_like(tensor, places.get(name)) for name, tensor in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(cut, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            ids = [number for group in saved["param_groups"] for number in group["params"]]
            state = {
                number: {name: cut_like(value, parameter) for name, value in saved["state"][number].items()}
                for number, parameter in zip(ids, parameters, strict=True)
                if number in saved["state"]
            }
            optimizer.load_state_dict({**saved, "state": state})


def refuse_what_cannot_be_cut(recipe: Recipe) -> None:
    """Raise ScfmError for settings that need whole tensors, naming the keys."""
    wrong = []
    if recipe.optimizer.name == "muon":
        wrong.append("optimizer.name: muon turns whole matrices, of which a process holds a part; choose adamw")
    if recipe.model.input_norm != "none":
        wrong.append(
            f"model.input_norm: {recipe.model.input_norm} reads the embedding outside of the model's own passes"
        )
    if str(recipe.trainer.precision) in ("16-mixed", "16"):
        wrong.append(
            "trainer.precision: 16-mixed scales gradients, which Lightning does not offer here; use bf16-mixed"
        )
    if wrong:
        raise ScfmError("trainer.strategy fsdp (ddp has no such limits):\n  " + "\n  ".join(wrong))


def whole(state: Any, keep: bool) -> Any:
    """Return a nested state with its cut tensors gathered on the CPU, one after another; empty ones unless `keep`."""

    def gathered(item: Any) -> Any:
        if isinstance(item, DTensor):
            item = item.full_tensor()
        if isinstance(item, Tensor):
            return item.detach().cpu() if keep else item.new_empty(0, device="cpu")
        return item

    return tree_map(gathered, state)


def part_of(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor: all of one that is not cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut_like(value: Any, place: Any) -> Any:
    """Return a whole tensor cut as the one whose place it takes; what was never cut as it is."""
    if not isinstance(place, DTensor) or not isinstance(value, Tensor) or value.shape != place.shape:
        return value
    # every process has read the same file: none needs to be sent its part
    local = value.to(place.device)
    return distribute_tensor(local, place.device_mesh, place.placements, src_data_rank=None)
