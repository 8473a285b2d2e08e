"""Processes change nothing: the same global batches, dropout, losses and weights on one, two and four."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs import tiny_recipe
from scbert_runs import SCBERT, scbert_recipe
from worlds import Weights, in_world, largest_difference, trained

from scfm.recipe import Recipe
from scfm.recipe_task import LoRAConfig, TaskConfig

pytestmark = pytest.mark.distributed

# sums over packs and ranks are rounded in another order, of float32 weights below 3
TOLERANCE = 2e-6
STEPS = 3
SMOOTH = {"lr": 1e-2, "eps": 1e-2}  # AdamW without its division by nearly nothing
STILL = {"dropout": 0.0, "layers": 2}
DOMAINS = {"input_norm": "domain", "domain": "batch", "cell_conditions": ["batch"]}
MANY, ONE_EACH = 130, 5000  # tokens per pack: four of four cells to a batch, or one on every process


@pytest.fixture(scope="module")
def recipes(shards: Path) -> dict[str, Recipe]:
    """The runs to compare, by name."""

    def recipe(tokens: int, make: Any = tiny_recipe, **sections: Any) -> Recipe:
        sections["data"] = {"tokens_per_pack": tokens, "valid_fraction": 0.05, **sections.get("data", {})}
        sections["optimizer"] = {**SMOOTH, **sections.get("optimizer", {})}
        sections["trainer"] = {"max_steps": STEPS, **sections.get("trainer", {})}
        return make(shards, Path("unused"), **sections)

    later = [{"name": "gep"}, {"name": "gepc"}, {"name": "cell_prompt", "start_step": 2}]
    together = [{"name": "gep", "loss": "cross_entropy"}, {"name": "ecs", "weight": 10.0}]
    domains = [
        {"name": "gep", "nonzero": True},
        {"name": "gepc", "nonzero": True, "start_step": 1},
        {"name": "dar", "condition": "batch", "start_step": 2},
        {"name": "cce"},
    ]
    redrawn = {"performer": SCBERT["model"]["performer"] | {"redraw_every": 2}}
    lora = replace(recipe(MANY, model=STILL | {"dropout": 0.2}), task=TaskConfig(setting="lora", lora=LoRAConfig(4)))
    return {
        "dropout": recipe(MANY, objectives=later, model={"dropout": 0.2}, optimizer={"weight_decay": 0.1}),
        "one pack each": recipe(ONE_EACH, objectives=together, model=STILL),
        "recomputed": recipe(MANY, objectives=together, model=STILL, trainer={"gradient_checkpointing": True}),
        "lora": lora,
        "scbert": recipe(150, scbert_recipe, model=redrawn),
        "domains": recipe(MANY, objectives=domains, model=STILL | DOMAINS),
        "muon": recipe(MANY, model=STILL, optimizer={"name": "muon", "lr": 1e-3}),
    }


# Muon turns bfloat16 copies of the gradients: rounding of the sums over ranks shows more than under AdamW
TOLERANCES = {"muon": 1e-4}
WHOLE = ("domains", "muon")  # what FSDP cannot cut

Runs = dict[str, tuple[Weights, dict[str, float]]]


@pytest.fixture(scope="module")
def alone(recipes: dict[str, Recipe]) -> Runs:
    return {name: trained(recipe) for name, recipe in recipes.items()}


@pytest.mark.parametrize(("devices", "strategy"), [(2, "ddp"), (4, "ddp"), (2, "fsdp"), (4, "fsdp")])
def test_several_processes_equal_one(recipes: dict[str, Recipe], alone: Runs, devices: int, strategy: str) -> None:
    kept = {"fsdp": [name for name in recipes if name not in WHOLE], "ddp": list(recipes)}[strategy]
    chosen = {name: recipes[name] for name in (kept if (devices, strategy) != (4, "fsdp") else kept[:2])}

    def every() -> Runs:
        return {name: trained(recipe, devices=devices, strategy=strategy) for name, recipe in chosen.items()}

    together = in_world(devices, every)[0]
    far = {name: largest_difference(alone[name][0], weights) for name, (weights, _) in together.items()}
    assert all(far[name] < TOLERANCES.get(name, TOLERANCE) for name in far), far
    for name, (_, losses) in together.items():
        assert len(losses) == STEPS + 1
        assert losses == pytest.approx(alone[name][1], rel=1e-3 if name == "muon" else 1e-5), name


def test_dropout_differs_only_where_the_packs_do(shards: Path) -> None:
    """One pack on one device are two on two: the draws are others, of the same kind."""
    recipe = tiny_recipe(shards, Path("unused"), model={"dropout": 0.2}, data={"tokens_per_pack": ONE_EACH})
    recipe = replace(recipe, trainer=replace(recipe.trainer, max_steps=1))
    one = trained(recipe)[1]["train 1"]
    two = in_world(2, lambda: trained(recipe, devices=2, strategy="ddp")[1]["train 1"])[0]
    assert one != pytest.approx(two, rel=1e-4)
    assert one == pytest.approx(two, rel=0.1)
