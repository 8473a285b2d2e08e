"""FSDP2 really cuts the model, sends what it should, exports what DDP does, and refuses what it cannot cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from runs import tiny_recipe
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import Weights, in_world, largest_difference, trained

from scfm.checkpoints.native import read_weights
from scfm.errors import ScfmError
from scfm.training.launch import build_trainer
from scfm.training.run import pretrain
from scfm.training.sharding import part_of

pytestmark = pytest.mark.distributed

SMOOTH = {"lr": 1e-2, "eps": 1e-2}


def test_the_exported_model_is_that_of_ddp(shards: Path, tmp_path: Path) -> None:
    """From recipe to safetensors, on two processes that the strategies fork."""
    found = []
    for strategy in ("ddp_fork", "fsdp_fork"):
        trainer = {"devices": 2, "strategy": strategy, "max_steps": 3}
        sections = {"model": {"dropout": 0.0}, "optimizer": SMOOTH, "data": {"tokens_per_pack": 200}}
        found.append(read_weights(pretrain(tiny_recipe(shards, tmp_path / strategy, **sections, trainer=trainer))))
    assert largest_difference(*found) < 2e-6


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16-mixed", 1e-3), ("bf16-true", 1e-2)])
def test_bf16(shards: Path, precision: str, tolerance: float) -> None:
    """FSDP gathers norms in bf16 too, which DDP keeps in float32 under bf16-mixed; 1e-2 is a step of bf16 weights."""
    sections = {"model": {"dropout": 0.0}, "optimizer": SMOOTH, "data": {"tokens_per_pack": 200}}
    recipe = tiny_recipe(shards, Path("unused"), **sections, trainer={"precision": precision, "max_steps": 3})

    def both() -> list[Weights]:
        return [trained(recipe, devices=2, strategy=strategy)[0] for strategy in ("ddp", "fsdp")]

    ddp, fsdp = in_world(2, both)[0]
    assert largest_difference(ddp, fsdp) < tolerance
    assert {name: tensor.dtype for name, tensor in fsdp.items()} == {name: tensor.dtype for name, tensor in ddp.items()}


class Held(L.Callback):
    """What this process holds of weights, gradients and optimizer states, in numbers, as a step ends."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        parameters = list(pl_module.network.parameters())
        assert all(isinstance(p, DTensor) and isinstance(p.grad, DTensor) for p in parameters)
        self.weights = sum(part_of(p).numel() for p in parameters)
        self.gradients = sum(part_of(p.grad).numel() for p in parameters)
        self.states = sum(part_of(s[k]).numel() for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq"))
        self.all = sum(p.numel() for p in parameters)


def test_each_process_holds_its_part(shards: Path) -> None:
    recipe = tiny_recipe(shards, Path("unused"), trainer={"max_steps": 2}, data={"tokens_per_pack": 200})

    def held() -> list[int]:
        held = Held()
        trained(recipe, devices=4, strategy="fsdp", watch=[held])
        return [held.weights, held.gradients, held.states, held.all]

    ranks = in_world(4, held)
    whole = ranks[0][3]
    sums = [sum(column) for column in zip(*ranks, strict=True)]
    assert sums[:3] == [whole, whole, 2 * whole]
    assert all(0.2 * whole < weights < 0.35 * whole for weights, *_ in ranks)


class Sent(L.Callback, TorchDispatchMode):
    """Counts the collectives of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = str(func).split(".")[1].strip("_")
            self.steps[-1][name] = self.steps[-1].get(name, 0) + 1
        return func(*args, **kwargs or {})

    def on_train_batch_start(self, *_: Any) -> None:
        self.steps.append({})
        self.__enter__()

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.__exit__(None, None, None)


def test_gradients_are_reduced_once_a_step(shards: Path) -> None:
    """Four packs to a process: DDP's one bucket goes round once, FSDP scatters each block and the rest once."""
    recipe = tiny_recipe(
        shards,
        Path("unused"),
        data={"tokens_per_pack": 65, "valid_fraction": 0.0},
        model={"layers": 3},
        trainer={"max_steps": 3},
        objectives=[{"name": "gep"}],
    )

    def counted() -> list[list[dict[str, int]]]:
        found = []
        for strategy in ("ddp", "fsdp"):
            sent = Sent()
            trained(recipe, devices=2, strategy=strategy, watch=[sent])
            found.append(sent.steps)
        return found

    ddp, fsdp = in_world(2, counted)[0]
    assert [step["allreduce"] for step in ddp] == [1] * 3
    assert [step["reduce_scatter_base"] for step in fsdp] == [3 + 1] * 3
    # each pack gathers the blocks for its forward and again for its backward, the rest once
    assert [step["allgather_base"] for step in fsdp] == [4 * (3 + 3 + 1)] * 3


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"optimizer": {"name": "muon"}}, r"optimizer\.name: muon turns whole matrices"),
        ({"model": {"input_norm": "batch"}}, r"model\.input_norm: batch reads the embedding"),
        ({"trainer": {"precision": "16-mixed"}}, r"trainer\.precision: 16-mixed scales gradients"),
    ],
)
def test_what_cannot_be_cut_is_refused(shards: Path, sections: dict[str, dict[str, str]], said: str) -> None:
    trainer = {"strategy": "fsdp", "devices": 2, **sections.get("trainer", {})}
    recipe = tiny_recipe(shards, Path("unused"), **sections | {"trainer": trainer})
    with pytest.raises(ScfmError, match=said):
        build_trainer(recipe, logger=False, enable_checkpointing=False)


@pytest.mark.slow
def test_compiled_blocks(shards: Path) -> None:
    recipe = tiny_recipe(
        shards, Path("unused"), model={"dropout": 0.0}, optimizer=SMOOTH, trainer={"compile": True, "max_steps": 3}
    )
    alone = trained(recipe)[0]
    cut = in_world(2, lambda: trained(recipe, devices=2, strategy="fsdp")[0], seconds=300)[0]
    assert largest_difference(alone, cut) < 2e-6
