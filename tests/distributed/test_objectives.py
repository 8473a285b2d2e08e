"""No process waits for the gradient of a parameter that nothing reaches, whatever the objectives and frozen parts."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, cycle
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from runs import tiny_recipe
from worlds import in_world, same_everywhere, trained

from scfm.checkpoints.native import ModelFiles
from scfm.data.shards import open_shards
from scfm.objectives import build_objectives
from scfm.recipe import ObjectiveConfig, Recipe
from scfm.recipe_task import LoRAConfig, TaskConfig
from scfm.training.run import Job, indices_of, modules_of, token_config

pytestmark = pytest.mark.distributed

OBJECTIVES = [
    ObjectiveConfig("gep"),
    ObjectiveConfig("gepc"),
    ObjectiveConfig("cls"),
    ObjectiveConfig("ecs"),
    ObjectiveConfig("dar", condition="batch"),
]
LORA = TaskConfig(setting="lora", lora=LoRAConfig(4))
LEARNS = [(["*"], None), (["heads.*", "backbone.blocks.0.*"], None), (["*"], LORA), (["backbone.*"], None)]


def job_of(recipe: Recipe) -> Job:
    """A model of any objectives, cls among them; it reads the batch even where no head is told it."""
    store = open_shards(Path(str(recipe.data.shards)))
    conditions, names = indices_of(store, ["batch", "cell_type"])
    labels = names.pop("cell_type")
    objectives = build_objectives(recipe.objectives, n_bins=recipe.data.n_bins, labels=labels, categories=names)
    files = ModelFiles(
        model=recipe.model,
        tokens=token_config(recipe),
        value_kind=store.value_kind,
        vocabulary=store.vocabulary,
        heads=[head for objective in objectives for head in objective.heads()],
        cell_conditions=names,
    )
    torch.manual_seed(0)
    known = {"batch": conditions["batch"], "label": np.asarray(conditions["cell_type"], np.int64)}
    return Job(recipe, store, files.build(), files, objectives, range(108), range(108, 108), known)


def combined(shards: Path) -> list[Recipe]:
    """Every set of objectives; the last of each begins at the second step, and what learns takes turns."""
    base = tiny_recipe(
        shards,
        Path("unused"),
        data={"tokens_per_pack": 200, "cells_per_batch": 8, "valid_fraction": 0.0},
        model={"dropout": 0.0, "cell_conditions": ["batch"]},
        trainer={"max_steps": 3},
    )
    sets = [chosen for size in range(1, len(OBJECTIVES) + 1) for chosen in combinations(OBJECTIVES, size)]
    found = []
    for chosen, (trainable, task) in zip(sets, cycle(LEARNS), strict=False):
        *first, last = chosen
        objectives = [*first, replace(last, start_step=1 if first else 0)]
        if trainable == ["heads.*", "backbone.blocks.0.*"] and not any(o.name != "ecs" for o in objectives):
            trainable = ["*"]
        found.append(replace(base, objectives=objectives, trainable=trainable, task=task))
    return found


class Alike(L.Callback):
    """Fails where ranks hold other weights after training."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert same_everywhere(torch.cat([p.detach().flatten() for p in pl_module.parameters()]))


def test_every_set_of_objectives_trains(shards: Path) -> None:
    recipes = combined(shards)
    assert len(recipes) == 2 ** len(OBJECTIVES) - 1

    def every() -> int:
        steps = 0
        for recipe in recipes:
            _, losses = trained(recipe, devices=2, strategy="ddp", job=job_of, watch=[Alike()])
            assert all(np.isfinite(loss) for loss in losses.values())
            steps += len(losses)
        return steps

    assert in_world(2, every) == [3 * len(recipes)] * 2


def test_what_nothing_reaches_is_told(shards: Path) -> None:
    """ECS alone reads no head that is told the batch: DDP would refuse its second step."""
    recipe = tiny_recipe(
        shards, Path("unused"), objectives=[{"name": "ecs"}], model={"dropout": 0.0, "cell_conditions": ["batch"]}
    )
    module, data = modules_of(job_of(recipe))
    pack = data.trial_pack(8)
    output = module.network(pack)
    loss = output.cell.sum()
    missed = {id(parameter) for parameter in module.unreached(loss, module.objectives)}
    names = {name for name, parameter in module.network.named_parameters() if id(parameter) in missed}
    assert names
    assert all(name.startswith("backbone.cell_conditions.batch.") for name in names)
