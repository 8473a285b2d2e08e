"""Recipes: one schema, every key explained, nothing in them executed."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path

import lightning as L
import pytest
import yaml

from scfm.cli import VERBS, function
from scfm.errors import ScfmError
from scfm.recipe import ObjectiveConfig, Recipe, TrainerConfig
from scfm.recipe_check import check
from scfm.recipe_reader import BUNDLED, bundled, merged, parse_recipe, read_recipe

WRITTEN = sorted(BUNDLED.rglob("*.yaml"))
RECIPES = [path for path in WRITTEN if path.parent.name != "evaluate"]  # studies, which are not runs


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(BUNDLED)))
def test_every_recipe_loads_and_can_work(path: Path) -> None:
    check(read_recipe(path))


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(BUNDLED)))
def test_every_key_carries_a_comment(path: Path) -> None:
    bare = [line for line in path.read_text().splitlines() if line.strip() and "#" not in line]
    assert bare == []


def test_the_whole_human_recipe_has_the_published_sizes() -> None:
    recipe = read_recipe(bundled("pretrain/scgpt-whole-human.yaml"))
    model = recipe.model
    assert (model.layers, model.heads, model.width, model.hidden, model.dropout) == (12, 8, 512, 512, 0.2)
    assert (recipe.data.max_genes + 1, recipe.data.n_bins, recipe.data.cells_per_batch) == (1200, 51, 512)
    assert (recipe.optimizer.lr, recipe.optimizer.warmup, recipe.trainer.max_epochs) == (1e-4, 10000, 6)
    assert [(term.name, term.weight) for term in recipe.objectives] == [("gep", 1), ("gepc", 1), ("cell_prompt", 1)]
    assert not model.unknown_output_projection


def test_a_saved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = read_recipe(
        bundled("finetune/annotation.yaml"), {"from": "some/model", "optimizer": {"betas": [0.8, 0.9]}}
    )
    recipe.save(tmp_path / "recipe.yaml")
    assert read_recipe(tmp_path / "recipe.yaml") == recipe


def test_the_command_line_wins_over_the_file() -> None:
    path = str(bundled("pretrain/quickstart.yaml"))
    arguments = ["--config", path, "--data.max_genes", "77", "--resume", "auto", "--objectives", "[{name: gepc}]"]
    recipe, options = parse_recipe(arguments, "scfm pretrain", "", function(VERBS["pretrain"][0]))
    assert (recipe.data.max_genes, recipe.data.cells_per_batch, options) == (77, 16, {"resume": "auto"})
    assert recipe.objectives == [ObjectiveConfig("gepc")]


@pytest.mark.parametrize(
    "asked", [["--config", "recipes/pretrain/quickstart.yaml"], ["--config=pretrain/quickstart.yaml"]]
)
def test_recipes_that_come_with_scfm_are_found_in_any_folder(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batch() -> int:
        recipe, _ = parse_recipe(asked, "scfm pretrain", "", function(VERBS["pretrain"][0]))
        return recipe.data.cells_per_batch

    monkeypatch.chdir(tmp_path)
    assert batch() == 16
    own = tmp_path / asked[-1].removeprefix("--config=")
    own.parent.mkdir(parents=True)
    own.write_text("data: {cells_per_batch: 99}\n")  # a file that is there comes first
    assert batch() == 99
    own.rename(tmp_path / "another.yaml")
    with pytest.raises(
        ScfmError, match=r"mine\.yaml: there is no such recipe file; those that come with scfm are recipes/"
    ):
        parse_recipe(["--config", "mine.yaml"], "scfm pretrain", "", function(VERBS["pretrain"][0]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data": {"max_gens": 3}}, "max_gens"),
        ({"data": {"max_genes": "many"}}, "max_genes"),
        ({"model": {"attention": "causal"}}, "generative"),
        ({"objectives": [{"name": "gep", "wait": 1}]}, "wait"),
        ({"trainer": {"callbacks": [{"class_path": "os.system"}]}}, "callbacks"),
        ({"model": {"class_path": "os.system"}}, "class_path"),
    ],
)
def test_what_is_not_in_the_schema_is_named(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ScfmError, match=message):
        read_recipe(bundled("pretrain/quickstart.yaml"), overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model": {"heads": 7}}, r"model\.heads: 7 does not divide model\.width 64"),
        ({"data": {"tokens_per_pack": 100}}, r"data\.tokens_per_pack: 100 cannot hold one cell"),
        ({"data": {"mask_ratios": [0]}}, "gep predicts unknown genes, but data.mask_ratios"),
        ({"data": {"mask_ratios": [1.5]}}, r"data\.mask_ratios: \[1.5\] must lie in"),
        ({"data": {"mask_kept": 1.0}}, r"data\.mask_kept: 1\.0 must lie in"),
        ({"data": {"mask_kept": 0.1}}, r"data\.mask_kept: 0\.1 shows values .* set model\.attention to full"),
        ({"objectives": []}, "objectives: is empty"),
        ({"objectives": [{"name": "gep"}, {"name": "gep"}]}, "gep stands there twice"),
        ({"optimizer": {"lr": 0.0}}, r"optimizer\.lr: 0\.0 must be positive"),
        ({"optimizer": {"momentum": 1.0}}, r"optimizer\.momentum: 1\.0 must lie in"),
        (
            {"optimizer": {"schedule": "cosine_restarts", "warmup": 0.1}},
            r"optimizer\.warmup: 0\.1 must be whole epochs, fewer than the 15 of optimizer\.cycle_epochs",
        ),
        ({"optimizer": {"schedule": "cosine_restarts", "warmup": 5, "cycle_epochs": 5}}, r"fewer than the 5 of"),
        ({"optimizer": {"schedule": "cosine_restarts", "warmup": 5, "cycle_growth": 0.5}}, r"optimizer\.cycle_growth"),
        ({"optimizer": {"schedule": "cosine_restarts", "warmup": 5, "cycle_decay": 0.0}}, r"optimizer\.cycle_decay"),
        ({"optimizer": {"schedule": "cosine_restarts", "warmup": 5, "min_lr": 1.0}}, r"optimizer\.min_lr: 1 must lie"),
        ({"data": {"values": "raw"}}, r"gep has loss cross_entropy over bins, but data\.values is raw"),
        ({"data": {"values": "raw"}, "model": {"value_encoder": "category"}}, r"model\.value_encoder: category embeds"),
    ],
)
def test_what_cannot_work_is_refused(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ScfmError, match=message):
        check(read_recipe(bundled("pretrain/quickstart.yaml"), overrides))


def test_yaml_cannot_execute_code(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: !!python/object/apply:os.system ['echo owned']")
    with pytest.raises(ScfmError, match="cannot be read as a recipe"):
        read_recipe(path)


def test_every_trainer_option_is_there_or_left_out_for_a_reason() -> None:
    objects = {"logger", "callbacks", "plugins", "model_registry"}
    of_the_recipe = {"accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "default_root_dir"}
    fixed = {
        "use_distributed_sampler",  # the loader serves each rank its own packs
        "enable_progress_bar",  # one dense line instead
        "enable_checkpointing",  # see the checkpoint section
        "barebones",
        "reload_dataloaders_every_n_epochs",
        "enable_autolog_hparams",
    }
    options = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    assert options - {field.name for field in fields(TrainerConfig)} == objects | of_the_recipe | fixed


def test_merging_replaces_lists_and_merges_sections() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    assert merged(base, {"a": {"c": [3]}, "d": 2}) == {"a": {"b": 1, "c": [3]}, "d": 2}
    assert yaml.safe_load(yaml.safe_dump(Recipe().to_dict())) == Recipe().to_dict()
