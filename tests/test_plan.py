"""`scfm plan`: numbers by hand, what it reads from shards, what it refuses, and that the CPU's speed is measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import tiny_recipe, write_shards

from scfm.cli import main
from scfm.data.shards import open_shards, read_manifest
from scfm.errors import ScfmError
from scfm.flops import DEVICES, Work
from scfm.plan import ASSUMED_MFU, USABLE, cells_of, network_of, objectives_of, plan_of
from scfm.rate import measure
from scfm.recipe import Recipe
from scfm.recipe_reader import read_recipe
from scfm.workload import mean_work, packs_of, schedule_of

WHOLE_HUMAN = Path(__file__).parents[1] / "recipes/pretrain/scgpt-whole-human.yaml"


def whole_human(**sections: Any) -> Recipe:
    return read_recipe(WHOLE_HUMAN, sections)


def test_the_published_run() -> None:
    plan = plan_of(whole_human(), "h200", gpus=2, cells=33_000_000)
    assert plan.parameters["gene_embedding"] == 60_697 * 512 + 2 * 512
    assert plan.parameters["blocks"] == 12 * (6 * 512 * 512 + 4 * 512 + 2 * 512 + 4 * 512)
    assert plan.parameters["total"] == plan.parameters["trained"] == pytest.approx(51.3e6, rel=0.001)
    assert plan.flops_per_cell == pytest.approx((193e9, 385e9), rel=0.01)
    per_epoch = (33_000_000 - 99_000) // 512
    assert (plan.steps, plan.validations) == (6 * per_epoch, pytest.approx(60))
    assert plan.memory["weights"] == plan.memory["gradients"] == 4 * plan.parameters["total"]
    assert plan.memory["optimizer"] == 8 * plan.parameters["total"]
    assert plan.checkpoint_bytes == 12 * plan.parameters["total"]
    assert plan.model_bytes == 4 * plan.parameters["total"]
    assert plan.mfu == ASSUMED_MFU
    assert plan.device_hours == pytest.approx(2 * plan.seconds / 3600)  # type: ignore[operator]
    assert any("ASSUMED, not measured: MFU 38%" in line for line in plan.assumptions)


def test_hours_are_flops_over_speed() -> None:
    recipe = whole_human(
        data={"fill_packs": False, "valid_fraction": 0.0}, trainer={"max_steps": 1500, "max_epochs": None}
    )
    plan = plan_of(recipe, "a100", mfu=0.5)
    first, last = plan.flops_per_cell
    flops = 512 * (1000 * first + 500 * last)  # the second pass starts at step 1000
    optimizer = 1500 * 7 * 4 * plan.parameters["trained"] / DEVICES["a100"].bandwidth
    assert plan.seconds == pytest.approx(flops / (0.5 * 312e12) + optimizer, rel=1e-3)
    assert plan_of(recipe, "a100", gpus=2, mfu=0.5).seconds == pytest.approx(plan.seconds / 2, rel=0.02)  # type: ignore[operator]


def test_filling_costs_time_but_is_no_model_flop() -> None:
    recipe = whole_human(trainer={"max_steps": 10})
    filled, bare = (
        plan_of(replace(recipe, data=replace(recipe.data, fill_packs=fill)), "h100") for fill in (True, False)
    )
    assert filled.flops_per_cell == bare.flops_per_cell
    assert filled.seconds > bare.seconds  # type: ignore[operator]
    real = 512 * 1200
    assert filled.packs.filling == filled.packs.rounds * filled.packs.tokens - real < 0.02 * real
    assert bare.packs.filling == 0
    assert bare.packs.tokens < filled.packs.tokens <= 65_536


def test_recomputed_blocks_take_a_third_more_time() -> None:
    kept, again = (
        plan_of(whole_human(trainer={"max_steps": 10, "gradient_checkpointing": key}), "h200") for key in (False, True)
    )
    assert again.flops_per_cell == kept.flops_per_cell
    assert again.mfu == pytest.approx(0.75 * kept.mfu)
    assert again.seconds == pytest.approx(4 / 3 * kept.seconds, rel=0.01)  # type: ignore[operator]
    assert any("blocks recomputed" in line for line in again.assumptions)


def test_heads_that_no_flash_kernel_takes_keep_the_mask() -> None:
    flash, dense = (plan_of(whole_human(model={"width": 480, "heads": heads}), "h100") for heads in (10, 24))
    assert dense.memory["activations"] > 1.2 * flash.memory["activations"]


def test_the_largest_pack_fits_and_the_next_does_not() -> None:
    small = plan_of(whole_human(), "rtx4090")
    assert small.largest_pack % 1024 == 0
    budget = USABLE * DEVICES["rtx4090"].memory
    many = {"cells_per_batch": 20_000}  # so that packs are full
    fits = plan_of(whole_human(data={"tokens_per_pack": small.largest_pack, **many}), "rtx4090")
    over = plan_of(whole_human(data={"tokens_per_pack": small.largest_pack + 4096, **many}), "rtx4090")
    assert fits.memory["total"] <= budget < over.memory["total"]
    wide = whole_human(model={"width": 4096, "hidden": 16384, "layers": 48})
    assert plan_of(wide, "rtx4090").largest_pack == 0


def test_shards_give_cells_lengths_and_vocabulary(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    recipe = tiny_recipe(shards, tmp_path / "run", data={"max_genes": 8})
    cells, store = cells_of(recipe, None, None), open_shards(shards)
    expected = np.minimum(store.n_genes(np.arange(store.n_cells)), 8) + 1
    assert (cells.count, cells.vocabulary) == (read_manifest(shards)["cells"], len(store.vocabulary))
    assert cells.lengths.tolist() == expected.tolist()
    assert any(str(shards) in line for line in cells.said)
    assert cells_of(recipe, 500, None).count == 500
    plan = plan_of(recipe, "h100")
    assert plan.tokens_per_cell == pytest.approx(expected.mean())
    every = replace(recipe, data=replace(recipe.data, genes="all", max_genes=5000))
    assert set(cells_of(every, None, None).lengths) == {store.vocabulary.n_genes + 1}
    with pytest.raises(ScfmError, match="--vocabulary: the shards"):
        plan_of(recipe, "h100", vocabulary=100)


def test_without_shards_what_is_assumed_is_said() -> None:
    plan = plan_of(whole_human(), "h100")
    assert (plan.steps, plan.seconds, plan.tokens_per_cell) == (None, None, 1200)
    assert [line.split(":")[0] for line in plan.assumptions[:3]] == ["cells", "tokens per cell", "vocabulary"]
    assert "assumed" in plan.assumptions[1]
    assert plan_of(whole_human(), "h100", vocabulary=1000).parameters["gene_embedding"] == 1002 * 512


def test_mean_work_is_that_of_the_tokeniser_s_cells() -> None:
    recipe = whole_human(data={"max_genes": 1200, "mask_ratios": [0.5]})
    cells = cells_of(recipe, None, None)
    assert mean_work(recipe, cells, 2) == Work.of_cell(1201, 601, "generative") + Work.of_cell(1201, 601, "generative")
    full = replace(recipe, model=replace(recipe.model, attention="full"))
    assert mean_work(full, cells, 1).pairs == 1201**2


def test_packs_are_those_of_the_loader() -> None:
    recipe = whole_human(data={"cells_per_batch": 100, "tokens_per_pack": 2500, "fill_packs": False})
    packs = packs_of(recipe, cells_of(recipe, None, None), processes=2)
    assert (packs.rounds, packs.tokens) == (25, 2400)  # two cells of 1,200 tokens in each


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({"max_epochs": 3}, (30, 3)),
        ({"max_epochs": 3, "max_steps": 20}, (20, 2)),
        ({"max_steps": 50, "max_epochs": None}, (50, 5)),
        ({"max_epochs": 4, "check_val_every_n_epoch": 2}, (40, 2)),
        ({"max_epochs": 2, "val_check_interval": 0.25}, (20, 8)),
        ({"max_epochs": 2, "val_check_interval": 5}, (20, 4)),
        ({"max_epochs": 2, "limit_train_batches": 4}, (8, 2)),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, (10, 2)),
        ({"max_epochs": None}, (None, 0)),
    ],
)
def test_steps_and_validations(trainer: dict[str, Any], expected: tuple[int, float]) -> None:
    recipe = whole_human(data={"cells_per_batch": 100}, trainer={"val_check_interval": None} | trainer)
    steps, validations = schedule_of(recipe, 1099)
    assert (steps, validations) == (expected[0], pytest.approx(expected[1]))


def test_every_bundled_recipe_can_be_planned_but_those_of_scbert() -> None:
    refused = []
    for path in [*WHOLE_HUMAN.parent.glob("*.yaml"), *WHOLE_HUMAN.parents[1].glob("finetune/*.yaml")]:
        recipe = read_recipe(path)
        if path.stem.startswith("scbert"):
            refused.append(path.stem)
            # a recipe of fine-tuning says which model it is for by the one that it starts from
            with pytest.raises(ScfmError, match=r"(?i)model\.name: scbert is not planned yet|is a setting of scbert"):
                plan_of(recipe, "l40s", cells=100_000)
            continue
        plan = plan_of(recipe, "l40s", cells=100_000)
        assert plan.seconds is not None
        assert plan.largest_pack > 0
    assert {"scbert-small", "scbert-panglao"} <= set(refused)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 0}, "--gpus: 0 must be at least 1"),
        ({"cells": -1}, "--cells: -1 must be at least 1"),
        ({"mfu": 38}, "--mfu: 38 must be a share"),
        ({"cells": 10}, "only 10 cells to read"),
    ],
)
def test_what_cannot_be_planned_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ScfmError, match=message):
        plan_of(whole_human(), "h100", **options)


def test_the_command_prints_plain_text_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    options = ["--device", "h200", "--gpus", "8", "--cells", "1000000", "--model.layers", "6", "--json", str(out)]
    assert main(["plan", "--config", str(WHOLE_HUMAN), *options]) == 0
    printed, plan = capsys.readouterr().out, json.loads(out.read_text())
    assert "8 x h200" in printed
    assert f"{plan['parameters']['total']:,}" in printed
    assert "\x1b" not in printed
    assert plan["devices"] == 8
    assert plan["parameters"]["blocks"] == 6 * plan_of(whole_human(), "h200").parameters["blocks"] // 12


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data.tokens_per_pack", "2000000", "--device", "rtx4090"]
    assert main(["plan", "--config", str(WHOLE_HUMAN), *options]) == 0
    printed = capsys.readouterr().out
    assert "DOES NOT FIT" in printed
    assert "not known: give data.shards, --cells" in printed


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_this_cpu_is_measured(tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scfm.rate.CEILING_SECONDS", 0.1)
    monkeypatch.setattr("scfm.rate.TIMED_SECONDS", 0.0)
    shards = write_shards(tmp_path / "shards")
    objectives = [{"name": name} for name in ("gep", "gepc", "ecs", "cce")] + [{"name": "dar", "condition": "batch"}]
    recipe = tiny_recipe(shards, tmp_path / "run", objectives=objectives, trainer={"precision": precision})
    state = torch.random.get_rng_state()
    plan = plan_of(recipe, "cpu")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert 0 < plan.mfu < 1
    assert plan.ceiling > 1e9
    assert plan.seconds is not None
    assert plan.seconds > 0
    assert any("real training steps on one pack" in line for line in plan.assumptions)
    assert not (tmp_path / "run").exists()


def test_steps_are_timed_with_blocks_as_the_recipe_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scfm.rate.CEILING_SECONDS", 0.1)
    monkeypatch.setattr("scfm.rate.TIMED_SECONDS", 0.0)
    trainer = {"gradient_checkpointing": True}
    recipe = tiny_recipe(write_shards(tmp_path / "shards"), tmp_path / "run", trainer=trainer)
    cells = cells_of(recipe, None, None)
    objectives = objectives_of(recipe, cells)[0]
    network: Any = network_of(recipe, cells, objectives)
    measure(recipe, network, objectives, cells.lengths, 400)
    assert network.backbone.recompute


def test_frozen_weights_have_no_optimizer_states(tmp_path: Path) -> None:
    recipe = tiny_recipe(write_shards(tmp_path / "shards"), tmp_path / "run")
    plan = plan_of(replace(recipe, trainable=["heads.*"]), "h100")
    assert plan.parameters["trained"] == plan.parameters["heads"]
    assert plan.memory["optimizer"] == 8 * plan.parameters["heads"]


def test_the_network_is_that_of_the_run(tmp_path: Path) -> None:
    from scfm.training.run import pretrain

    recipe = tiny_recipe(write_shards(tmp_path / "shards"), tmp_path / "run", trainer={"max_steps": 1})
    cells = cells_of(recipe, None, None)
    planned = network_of(recipe, cells, objectives_of(recipe, cells)[0])
    from safetensors.torch import load_file

    saved = load_file(pretrain(recipe) / "model.safetensors")
    assert {name: tensor.shape for name, tensor in planned.state_dict().items()} == {
        name: tensor.shape for name, tensor in saved.items()
    }
