"""A run goes on under DDP what it began under FSDP and the other way round, on more or on fewer processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import tiny_recipe
from worlds import Weights, in_world, largest_difference, trained

from scfm.recipe import Recipe

pytestmark = pytest.mark.distributed

STEPS, SAVED = 5, 2
TOLERANCE = 2e-6  # as in test_exactness: sums in another order
# packs on four processes are those on one, so that dropout draws alike; a term begins after the checkpoint
SECTIONS: dict[str, Any] = {
    "data": {"tokens_per_pack": 130, "valid_fraction": 0.05},
    "model": {"dropout": 0.2, "layers": 2},
    "objectives": [{"name": "gep"}, {"name": "gepc", "start_step": 3}],
    "optimizer": {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1},
    "trainer": {"max_steps": STEPS},
}


@pytest.fixture(scope="module")
def recipe(shards: Path) -> Recipe:
    return tiny_recipe(shards, Path("unused"), **SECTIONS)


@pytest.fixture(scope="module")
def unbroken(recipe: Recipe) -> Weights:
    return trained(recipe)[0]


@pytest.fixture(scope="module")
def checkpoints(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of two processes, by strategy, and of one."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {name: folder / f"{name}.ckpt" for name in ("alone", "ddp", "fsdp")}
    trained(recipe, save_at=SAVED, path=paths["alone"])

    def both() -> None:
        for name in ("ddp", "fsdp"):
            trained(recipe, devices=2, strategy=name, save_at=SAVED, path=paths[name])

    in_world(2, both)
    return paths


def test_checkpoints_have_one_form(checkpoints: dict[str, Path]) -> None:
    """Whole tensors, in the order of one process."""
    states = {name: torch.load(path, weights_only=True) for name, path in checkpoints.items()}
    one = states["alone"]
    for name in ("ddp", "fsdp"):
        assert states[name].keys() == one.keys()
        assert largest_difference(states[name]["state_dict"], one["state_dict"]) < TOLERANCE
        (mine,), (other,) = states[name]["optimizer_states"], one["optimizer_states"]
        assert mine["param_groups"] == other["param_groups"]
        assert mine["state"].keys() == other["state"].keys()
        for number, state in other["state"].items():
            assert largest_difference(mine["state"][number], state) < TOLERANCE


@pytest.mark.parametrize("began", ["ddp", "fsdp"])
def test_two_processes_then_one(recipe: Recipe, unbroken: Weights, checkpoints: dict[str, Path], began: str) -> None:
    weights, losses = trained(recipe, resume=checkpoints[began])
    assert f"train {SAVED + 1}" in losses
    assert f"train {SAVED}" not in losses
    assert largest_difference(weights, unbroken) < TOLERANCE


def test_onto_four_processes(recipe: Recipe, unbroken: Weights, checkpoints: dict[str, Path]) -> None:
    """Each begins under one strategy and goes on under another, or as one and goes on cut."""
    ways = [("ddp", "ddp"), ("ddp", "fsdp"), ("fsdp", "ddp"), ("fsdp", "fsdp"), ("alone", "fsdp")]

    def every() -> list[Weights]:
        return [trained(recipe, devices=4, strategy=goes_on, resume=checkpoints[began])[0] for began, goes_on in ways]

    for way, weights in zip(ways, in_world(4, every)[0], strict=True):
        assert largest_difference(weights, unbroken) < TOLERANCE, way
