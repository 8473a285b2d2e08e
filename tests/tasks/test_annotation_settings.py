"""The five settings of annotation from one recipe key, few labels, and types that were never shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from cells import TYPES, made_up_cells
from runs import tiny_recipe, write_shards
from scbert_runs import scbert_recipe

import scfm
from scfm.checkpoints.convert import convert
from scfm.checkpoints.native import read_model, read_weights
from scfm.errors import ScfmError
from scfm.metrics_file import read_metrics
from scfm.model.neighbours import TEMPERATURE, NeighbourDecoder
from scfm.model.novelty import UNASSIGNED, novelty
from scfm.recipe import ModelConfig, Recipe
from scfm.recipe_check import check
from scfm.recipe_reader import bundled, like, read_recipe
from scfm.tasks.annotation import default_recipe, few_per_type, paced_recipe
from scfm.tasks.frozen import fit_probe
from scfm.tasks.novel_types import novel_as_unassigned
from scfm.training.finetune import finetune
from scfm.training.run import pretrain

SETTINGS = ["zero_shot", "probe", "full", "scratch", "lora"]
QUICK: dict[str, Any] = {"data": {"cells_per_batch": 16}, "trainer": {"max_epochs": 1, "accelerator": "cpu"}}
LORA = {"rank": 4}


@pytest.fixture(scope="module")
def scgpt(tmp_path_factory: pytest.TempPathFactory) -> scfm.PretrainedModel:
    place = tmp_path_factory.mktemp("settings")
    return scfm.load(pretrain(tiny_recipe(write_shards(place / "shards"), place / "run")))


@pytest.fixture(scope="module")
def scbert(tmp_path_factory: pytest.TempPathFactory) -> scfm.PretrainedModel:
    place = tmp_path_factory.mktemp("scbert-settings")
    return scfm.load(pretrain(scbert_recipe(write_shards(place / "shards"), place / "run")))


def annotate(model: scfm.PretrainedModel, out: Path, cells: anndata.AnnData, **task: Any) -> scfm.PretrainedModel:
    section = {"name": "annotation", "lora": LORA, "min_steps": 0, **task}
    return model.finetune(cells, section, out=str(out), **QUICK)


@pytest.mark.parametrize("name", ["scgpt", "scbert"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_ends_in_an_ordinary_model(
    setting: str, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue(name)
    tuned = annotate(model, tmp_path / "run", made_up_cells(60, seed=1), setting=setting, neighbours=1)
    weights, pretrained = read_weights(tmp_path / "run" / "model"), read_weights(model.source)
    backbone = {name for name in weights if name.startswith("backbone.")}
    assert backbone == {name for name in pretrained if name.startswith("backbone.")}
    moved = {name for name in backbone if not torch.equal(weights[name], pretrained[name])}
    frozen = setting in ("zero_shot", "probe")
    assert bool(moved) != frozen
    if setting == "lora":
        assert " of them trained; 54 training" in (tmp_path / "run" / "log.txt").read_text()
        assert {name.rsplit(".", 2)[-2] for name in moved} == {"qkv", "out_proj", "linear1", "linear2"}
    again = made_up_cells(30, seed=2)
    predicted = scfm.load(tmp_path / "run" / "model").predict(again)
    assert predicted.obs["annotation"].cat.categories.tolist() == TYPES
    probabilities = predicted.obsm["annotation_probabilities"]
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    alone = tuned.predict(again[7].copy()).obsm["annotation_probabilities"]
    np.testing.assert_allclose(alone[0], probabilities[7], atol=1e-5)
    if setting == "zero_shot":  # a cell is its own nearest neighbour: all are right but the 6 that validated
        seen = tuned.predict(made_up_cells(60, seed=1)).obs
        assert (seen["annotation"].to_numpy() == seen["cell_type"].to_numpy()).sum() >= 54


def test_a_stopped_lora_run_ends_with_the_weights_of_an_unbroken_one(
    scgpt: scfm.PretrainedModel, tmp_path: Path
) -> None:
    shards = Path(scgpt.source).parents[1] / "shards"

    def tuned(out: str, steps: int, resume: str | None = None) -> dict[str, torch.Tensor]:
        sections = {
            "out": str(tmp_path / out),
            "from": scgpt.source,
            "data": {"shards": str(shards), "cells_per_batch": 16},
            "optimizer": {"schedule": "constant", "warmup": 0},
            "trainer": {"max_steps": steps, "accelerator": "cpu"},
            "checkpoint": {"every_steps": 2},
            "task": {"setting": "lora", "lora": LORA},
        }
        recipe = read_recipe(bundled("finetune/annotation.yaml"), sections, like(scgpt.files))
        return read_weights(finetune(recipe, resume))

    whole = tuned("whole", 6)
    tuned("stopped", 3)
    resumed = tuned("stopped", 6, "auto")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_what_a_model_saw_follows_from_its_setting(scgpt: scfm.PretrainedModel, tmp_path: Path) -> None:
    """A model from scratch never saw the pretraining cells; all others did, and keep saying so."""
    assert scgpt.files.cell_hashes is not None
    for setting in ("scratch", "zero_shot"):
        files = annotate(scgpt, tmp_path / setting, made_up_cells(60, seed=1), setting=setting).files
        assert files.cell_hashes is not None
        assert len(files.cell_hashes) == 60 + (0 if setting == "scratch" else len(scgpt.files.cell_hashes))
        assert ("pretraining" in files.training_data) == (setting != "scratch")
        assert f"| setting | {setting}: " in files.card


def test_a_vote_of_cells_is_none_of_the_originals(scgpt: scfm.PretrainedModel, tmp_path: Path) -> None:
    annotate(scgpt, tmp_path / "run", made_up_cells(60, seed=1), setting="zero_shot")
    with pytest.raises(ScfmError, match=r"vote of reference cells, which scGPT has no place for; --drop 'heads\.annot"):
        convert(str(tmp_path / "run" / "model"), to="scgpt", out=str(tmp_path / "out"))


def test_the_neighbours_vote_by_their_cosine() -> None:
    head = NeighbourDecoder(2, 3, references=4, neighbours=2)
    head.learn(torch.tensor([[5.0, 0], [3, 3], [0, 2], [-1, 0]]), torch.tensor([0, 1, 1, 2]))
    cell = torch.tensor([[2.0, 1.0]])
    cosines = torch.tensor([2.0, 3 / 2**0.5]) / 5**0.5
    votes = (cosines / TEMPERATURE).exp()
    expected = torch.tensor([[votes[0].log(), votes[1].log(), -torch.inf]])
    torch.testing.assert_close(head(cell), expected)
    torch.testing.assert_close(head(cell * 100), expected)


@pytest.mark.parametrize("n_types", [2, 3])
def test_the_probe_is_the_logistic_regression_on_the_embedding(n_types: int) -> None:
    from sklearn.linear_model import LogisticRegression

    draw = np.random.default_rng(0)
    classes = np.arange(90) % n_types
    cells = (draw.normal(size=(90, 5)) + classes[:, None] * [1, 0, 2, 0, -1]).astype(np.float32) * [1, 9, 1, 0.1, 1] + 3
    recipe = read_recipe(bundled("finetune/annotation.yaml"))
    assert recipe.task is not None
    weight, bias = fit_probe(cells, classes, cells[:0], classes[:0], recipe.task, seed=0)
    scaled = (cells - cells.mean(0)) / cells.std(0)
    expected = LogisticRegression(C=1.0, max_iter=1000).fit(scaled, classes).predict_proba(scaled)
    logits = torch.from_numpy(cells).float() @ weight.t() + bias
    np.testing.assert_allclose(logits.softmax(-1).numpy(), expected, atol=1e-4)


def test_few_labels_are_nested_and_count_the_validation_cells(scgpt: scfm.PretrainedModel, tmp_path: Path) -> None:
    labels = np.repeat([0, 1, 2], [50, 6, 2])
    rows = np.arange(58)
    five, ten = (few_per_type(rows, labels, most, seed=3) for most in (5, 10))
    assert np.bincount(labels[five]).tolist() == [5, 5, 2]
    assert set(five) <= set(ten)
    assert few_per_type(rows, labels, None, seed=3) is rows
    tuned = annotate(scgpt, tmp_path / "five", made_up_cells(60, seed=1), cells_per_type=5, min_steps=4)
    assert len(tuned.files.cell_hashes) == len(scgpt.files.cell_hashes) + 15
    assert max(step for step, _, _ in read_metrics(tmp_path / "five" / "metrics.csv")) == 4  # 12 to learn from: a batch
    one = annotate(scgpt, tmp_path / "one", made_up_cells(60, seed=1), cells_per_type=1, setting="zero_shot")
    head = one.files.heads[0]
    assert (head.kind, head.references) == ("neighbours", 3)


def test_the_rate_fits_the_width_and_the_setting() -> None:
    """The rate of width 512 is the published one; width 64, measured on real cells, wants ten times that, LoRA too."""
    rates = {}
    for width in (64, 512):
        path = bundled(default_recipe(ModelConfig(width=width)))
        for setting in ("full", "lora"):
            recipe = read_recipe(path, {"task": {"setting": setting}})
            assert recipe.task is not None
            rates[width, setting] = paced_recipe(recipe, recipe.task, 1000)[0].optimizer.lr
    assert rates == pytest.approx({(64, "full"): 1e-3, (64, "lora"): 1e-2, (512, "full"): 1e-4, (512, "lora"): 1e-3})
    assert default_recipe(ModelConfig(name="scbert", width=200)) == "finetune/scbert-annotation.yaml"


def test_few_cells_are_passed_over_more_often() -> None:
    recipe = read_recipe(
        None, {"data": {"cells_per_batch": 10}, "trainer": {"max_epochs": 3}, "task": {"min_steps": 50}}
    )
    assert recipe.task is not None
    paced, notes = paced_recipe(recipe, recipe.task, 45)
    assert (paced.trainer.max_epochs, paced.trainer.check_val_every_n_epoch) == (15, 5)
    assert notes == ["15 epochs, a validation every 5, to reach task.min_steps 50"]
    assert paced_recipe(recipe, recipe.task, 1000) == (recipe, [])
    recipe.trainer.max_epochs = -1  # as Lightning has it: until max_steps
    assert paced_recipe(recipe, recipe.task, 45) == (recipe, [])


@pytest.mark.parametrize("score", ["probability", "energy"])
@pytest.mark.parametrize("setting", ["zero_shot", "probe"])
def test_novel_types_are_left_unassigned(score: str, setting: str, scgpt: scfm.PretrainedModel, tmp_path: Path) -> None:
    cells = made_up_cells(240, seed=1)
    section = {"name": "annotation", "setting": setting, "novel_types": score, "known_kept": 0.9}
    tuned = scgpt.finetune(cells, section, out=str(tmp_path / "run"), data={"valid_fraction": 0.5})
    head = read_model(tmp_path / "run" / "model").heads[0]
    assert (head.novelty, head.threshold is None) == (score, False)
    predicted = tuned.predict(made_up_cells(90, seed=5))
    rejected = (predicted.obs["annotation"] == UNASSIGNED).to_numpy()
    assert (rejected == (predicted.obs["annotation_novelty"] > head.threshold)).all()
    assert rejected.mean() < 0.35  # of known types: a tenth, but for chance
    everyone = tuned.predict(made_up_cells(90, seed=5), unassigned_below=0)
    assert UNASSIGNED not in everyone.obs["annotation"].to_numpy()


def test_novelty_scores_by_hand() -> None:
    logits = np.log([[0.5, 0.25, 0.25], [2.0, 6.0, 2.0]])
    np.testing.assert_allclose(novelty(logits, "probability"), [0.5, 0.4])
    np.testing.assert_allclose(novelty(logits, "energy"), [0, -np.log(10)], atol=1e-12)


def test_types_that_were_never_shown_should_be_unassigned() -> None:
    truth = np.array(["B cell", "platelet", "T cell"])
    assert novel_as_unassigned(truth, {"B cell", "T cell"}).tolist() == ["B cell", UNASSIGNED, "T cell"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"task": {"setting": "lora"}, "trainable": ["heads.*"]}, r"trainable: .* says what the setting full trains"),
        ({"task": {"lora": {"rank": 0}}}, r"task\.lora\.rank: 0 must be at least 1"),
        ({"task": {"cells_per_type": 0}}, r"task\.cells_per_type: 0"),
        ({"task": {"novel_types": "energy", "cells_per_type": 1}}, r"task\.cells_per_type 1 leaves none"),
        ({"task": {"novel_types": "energy"}, "data": {"valid_fraction": 0}}, r"raise data\.valid_fraction"),
        ({"task": {"known_kept": 0.0}}, r"task\.known_kept: 0\.0 must lie in"),
    ],
)
def test_what_cannot_work_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ScfmError, match=message):
        check(read_recipe(bundled("finetune/annotation.yaml"), sections))


def test_the_command_line_reaches_every_key_of_the_setting() -> None:
    from scfm.recipe_reader import parse_recipe

    path = str(bundled("finetune/annotation.yaml"))
    given = ["--config", path, "--task.setting", "lora", "--task.lora.rank", "2", "--task.cells_per_type", "5"]
    recipe: Recipe = parse_recipe(given, "scfm finetune", "", finetune)[0]
    assert recipe.task is not None
    assert (recipe.task.setting, recipe.task.lora.rank, recipe.task.cells_per_type) == ("lora", 2, 5)
    assert recipe.task.lora.alpha == 16
