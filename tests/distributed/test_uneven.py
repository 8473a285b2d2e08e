"""Cells that do not divide by the processes: no process waits for another, and the numbers are those of one."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import tiny_recipe
from worlds import in_world, largest_difference, trained

from scfm.recipe import Recipe

pytestmark = pytest.mark.distributed


def recipes(shards: Path) -> dict[str, Recipe]:
    def recipe(cells: int, tokens: int, held_out: float) -> Recipe:
        return tiny_recipe(
            shards,
            Path("unused"),
            data={"cells_per_batch": cells, "tokens_per_pack": tokens, "valid_fraction": held_out},
            model={"dropout": 0.0},
            optimizer={"lr": 1e-2, "eps": 1e-2},
            objectives=[{"name": "gep"}, {"name": "ecs"}],
            trainer={"max_steps": 2},
        )

    return {
        "cells that no number of ranks divides": recipe(7, 100, 0.1),
        "fewer cells than ranks": recipe(2, 400, 0.1),
        "a last validation batch of one cell": recipe(10, 400, 11 / 120),
        "one cell to validate": recipe(16, 400, 1 / 120),
    }


@pytest.mark.parametrize(("devices", "strategy"), [(4, "ddp"), (3, "fsdp")])
def test_uneven_cells(shards: Path, devices: int, strategy: str) -> None:
    chosen = recipes(shards)

    def every() -> dict[str, tuple[dict, dict]]:
        return {name: trained(recipe, devices=devices, strategy=strategy) for name, recipe in chosen.items()}

    together = in_world(devices, every)[0]
    for name, recipe in chosen.items():
        weights, losses = trained(recipe)
        assert len(losses) == 3
        assert together[name][1] == pytest.approx(losses, rel=1e-5), name
        assert largest_difference(weights, together[name][0]) < 2e-6, name
