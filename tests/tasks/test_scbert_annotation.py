"""Annotation with scBERT: what trains, what is weighted, when it stops, and who stays unassigned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cells import TYPES, made_up_cells
from runs import write_shards
from safetensors.torch import load_file
from scbert_cases import our_tensors
from scbert_runs import scbert_recipe

import scfm
from scfm.errors import ScfmError
from scfm.metrics_file import read_metrics
from scfm.model import ScBERT
from scfm.model.heads import HeadSpec
from scfm.recipe import ModelConfig, PerformerConfig, Recipe
from scfm.recipe_reader import bundled, like, read_recipe
from scfm.training.run import Job, pretrain, set_trainable

QUICK: dict[str, Any] = {
    "data": {"cells_per_batch": 8},
    "trainer": {"max_epochs": 12, "accelerator": "cpu"},
    "optimizer": {"lr": 5e-3},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> scfm.PretrainedModel:
    place = tmp_path_factory.mktemp("scbert")
    return scfm.load(pretrain(scbert_recipe(write_shards(place / "shards"), place / "run")))


@pytest.fixture(scope="module")
def tuned(model: scfm.PretrainedModel) -> scfm.PretrainedModel:
    return model.finetune(made_up_cells(150, seed=7), **QUICK)


def recipe_named(name: str, model: scfm.PretrainedModel) -> Recipe:
    return read_recipe(bundled(f"finetune/{name}.yaml"), {}, like(model.files))


def network_of(layers: int) -> ScBERT:
    config = ModelConfig(
        name="scbert",
        width=8,
        heads=2,
        layers=layers,
        hidden=8,
        dropout=0.0,
        attention="full",
        cell_embedding="mean",
        gene_table="some.npy",
        performer=PerformerConfig(head_width=4),
    )
    return ScBERT(config, 12, 10, 6, {}, {}, [HeadSpec("annotation", "genes", 3, TYPES)])


@pytest.mark.golden
def test_compat_trains_exactly_what_the_original_does(shared: Path, model: scfm.PretrainedModel) -> None:
    """The stored model has 3 blocks and the published one 6: in both the last but one trains."""
    folder = shared / "golden" / "scbert" / "finetune_head"
    trainable = json.loads((folder / "case.json").read_text())["meta"]["trainable"]
    weights = load_file(folder / "state_dict.safetensors")
    expected = {
        name.replace("blocks.1.", "blocks.4.") for name in our_tensors({name: weights[name] for name in trainable})
    }
    network = network_of(layers=6)
    set_trainable(network, recipe_named("scbert-annotation-compat", model).trainable)
    assert {name for name, parameter in network.named_parameters() if parameter.requires_grad} == expected


@pytest.mark.golden
def test_unassigned_are_those_of_the_original(shared: Path) -> None:
    folder = shared / "golden" / "scbert" / "finetune_head"
    meta = json.loads((folder / "case.json").read_text())["meta"]
    logits = load_file(folder / "tensors.safetensors")["logits"].numpy()
    head = HeadSpec("annotation", "genes", 5, list("abcde"))
    cells = made_up_cells(4)
    scfm.PretrainedModel.write_labels(cells, head, logits, 0.5)
    assert cells.obs["annotation"].tolist() == meta["predictions_at_0_5"]
    scfm.PretrainedModel.write_labels(cells, head, 1000 * logits, 0.5)
    assert cells.obs["annotation"].tolist() == [head.labels[k] for k in logits.argmax(1)]


def test_by_default_every_parameter_trains_but_a_given_gene_table(model: scfm.PretrainedModel) -> None:
    network = network_of(layers=2)
    set_trainable(network, recipe_named("scbert-annotation", model).trainable)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not network.backbone.gene_embedding.weight.requires_grad


def test_a_model_of_few_blocks_is_told_that_the_fifth_is_missing(model: scfm.PretrainedModel) -> None:
    with pytest.raises(ScfmError, match=r"trainable: 'backbone\.blocks\.4\.\*' matches no parameter"):
        set_trainable(network_of(layers=2), recipe_named("scbert-annotation-compat", model).trainable)


@pytest.mark.parametrize(
    ("name", "mode", "redraw_every"),
    [("scbert-annotation", "correct", 0), ("scbert-annotation-compat", "compat", 1000)],
)
def test_recipes_change_how_features_are_drawn_and_keep_the_models_shape(
    name: str, mode: str, redraw_every: int, model: scfm.PretrainedModel
) -> None:
    performer = recipe_named(name, model).model.performer
    assert (performer.mode, performer.redraw_every) == (mode, redraw_every)
    assert performer.head_width == model.files.model.performer.head_width == 8


def test_it_learns_types_from_a_number_per_gene(tuned: scfm.PretrainedModel, tmp_path: Path) -> None:
    (head,) = tuned.files.heads
    assert (head.kind, head.labels) == ("genes", TYPES)
    assert tuned.network.heads["annotation"].linear1.in_features == 60 + 1  # `<cls>` is the last
    result = tuned.predict(made_up_cells(90, seed=8))
    assert (result.obs["annotation"].astype(str) == result.obs["cell_type"].astype(str)).mean() > 0.9
    tuned.save_pretrained(tmp_path / "tuned")
    again = scfm.load(tmp_path / "tuned").predict(made_up_cells(90, seed=8))
    np.testing.assert_array_equal(again.obsm["annotation_probabilities"], result.obsm["annotation_probabilities"])


def test_features_stay_those_of_pretraining(model: scfm.PretrainedModel, tuned: scfm.PretrainedModel) -> None:
    for before, after in zip(model.network.backbone.blocks, tuned.network.backbone.blocks, strict=True):
        assert torch.equal(before.mixer.projection, after.mixer.projection)


def test_a_run_that_no_longer_improves_ends_and_exports_its_best(model: scfm.PretrainedModel, tmp_path: Path) -> None:
    """At such a rate the weights stay as they are: no validation is better than the first."""
    out = tmp_path / "run"
    recipe = recipe_named("scbert-annotation", model)
    assert recipe.checkpoint.patience < recipe.trainer.max_epochs
    still = {"optimizer": {"lr": 1e-30}, "checkpoint": {"patience": 3}, "out": str(out)}
    model.finetune(made_up_cells(60, seed=7), **(QUICK | still))
    metrics = read_metrics(out / "metrics.csv")
    assert len([name for _, name, _ in metrics if name == "valid/loss"]) == 1 + 3
    assert "ended early: 3 validations in a row" in (out / "log.txt").read_text()


class Caught(Exception):
    """Carries the job that was about to be trained."""

    def __init__(self, job: Job) -> None:
        self.job = job


@pytest.mark.parametrize(("kind", "weighted"), [("balanced", True), ("none", False)])
def test_rare_types_weigh_more_in_the_head_of_genes(
    kind: str, weighted: bool, model: scfm.PretrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def catch(job: Job, run: object) -> Path:
        raise Caught(job)

    monkeypatch.setattr("scfm.training.run.fit", catch)
    cells = made_up_cells(90, seed=7)
    few = cells[np.r_[0:90:3, 1:90:3, 2:30:3]].copy()  # 30 B, 30 NK, 10 T
    with pytest.raises(Caught) as caught:
        model.finetune(few, {"class_weights": kind}, **QUICK)
    job = caught.value.job
    (objective,) = job.objectives
    (batch,) = model.packs(job.store, {"label": job.cell_conditions["label"]}, 10_000)
    output = job.network.eval()(batch)
    loss, _ = objective.loss(batch, output)
    own = torch.nn.functional.cross_entropy(
        output.predictions["annotation"], batch.cell_conditions["label"], reduction="none"
    )
    weights = torch.tensor([70 / 90, 70 / 90, 70 / 30])[batch.cell_conditions["label"]] if weighted else 1
    torch.testing.assert_close(loss, (weights * own).mean())
