"""Batch integration: what is trained, which genes are read, and cells of batches that were never seen."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from cells import GENES, made_up_cells
from runs import tiny_recipe, write_shards

import scfm
from scfm.baselines.hvg_pca import highly_variable
from scfm.baselines.inputs import ExpressionRule
from scfm.checkpoints.native import read_model, read_weights
from scfm.data.sources import store_from_anndata
from scfm.errors import ScfmError
from scfm.evaluation.embedders import embedder
from scfm.evaluation.protocol import ModelInput
from scfm.metrics_file import read_metrics
from scfm.model.embeddings import CellCondition
from scfm.pretrained import EMBEDDING
from scfm.recipe import TaskConfig, defaults_of
from scfm.recipe_reader import bundled, like, read_recipe
from scfm.tasks.finetuning import start
from scfm.tasks.integration import batch_codes, log_expression, with_batch
from scfm.training.finetune import finetune
from scfm.training.run import pretrain

N_GENES = 20
QUICK: dict[str, Any] = {
    "data": {"cells_per_batch": 32},
    "trainer": {"max_epochs": 1, "accelerator": "cpu"},
    "optimizer": {"lr": 1e-2},
}
TASK = {"name": "integration", "genes": N_GENES}
# by name "10" comes first, by number 3
NAMES = {"batch0": "10", "batch1": "3"}


def cells(n: int = 120, seed: int = 0) -> anndata.AnnData:
    """Return made-up cells whose batches are called 10 and 3."""
    adata = made_up_cells(n, seed)
    adata.obs["batch"] = adata.obs["batch"].astype(str).map(NAMES)
    return adata


def embedding(model: scfm.PretrainedModel, adata: anndata.AnnData) -> np.ndarray:
    return model.embed(adata.copy()).obsm[EMBEDDING]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("integration")


@pytest.fixture(scope="module")
def model(place: Path) -> scfm.PretrainedModel:
    return scfm.load(pretrain(tiny_recipe(write_shards(place / "shards"), place / "pretrained")))


@pytest.fixture(scope="module")
def tuned(model: scfm.PretrainedModel, place: Path) -> scfm.PretrainedModel:
    return model.finetune(cells(), TASK, out=str(place / "run"), **QUICK)


def test_all_published_terms_are_trained_with_the_published_weights(tuned: scfm.PretrainedModel, place: Path) -> None:
    recipe = read_recipe(place / "run" / "recipe.yaml")
    assert [(o.name, o.weight, o.nonzero, o.condition) for o in recipe.objectives] == [
        ("gep", 1, True, None),
        ("gepc", 1, True, None),
        ("ecs", 10, False, None),
        ("dar", 1, False, "batch"),
    ]
    assert (recipe.objectives[2].threshold, recipe.data.mask_ratios) == (0.8, [0.4])
    assert (recipe.model.domain, recipe.model.cell_conditions) == ("batch", ["batch"])
    heads = {head.task: head for head in tuned.files.heads}
    assert list(heads) == ["gep", "gepc", "dar"]
    assert heads["dar"].labels == ["10", "3"]
    assert heads["gep"].nonzero
    assert heads["gepc"].nonzero
    terms = {"valid/gep_nonzero", "valid/gepc_nonzero", "valid/ecs", "valid/dar", "valid/loss"}
    assert terms <= {name for _, name, _ in read_metrics(place / "run" / "metrics.csv")}


def test_each_batch_has_statistics_of_its_own(tuned: scfm.PretrainedModel) -> None:
    norm: Any = tuned.network.get_submodule("backbone.input_norm")
    assert norm.running_mean.shape == (2, 16)
    # 54 training cells of each batch, 108 in 3 steps of 32 and a rest that is left over: both in every step
    assert norm.num_batches_tracked.tolist() == [3, 3]
    assert not torch.equal(norm.running_mean[0], norm.running_mean[1])


def test_the_best_epoch_is_that_of_the_hidden_genes_set_aside(tuned: scfm.PretrainedModel, place: Path) -> None:
    assert read_recipe(place / "run" / "recipe.yaml").checkpoint.best == "valid/gep"
    assert tuned.files.training_data["stage"] == "integration"
    assert tuned.files.training_data["pretraining"]["stage"] == "pretraining"


def test_a_saved_model_embeds_as_before(tuned: scfm.PretrainedModel, place: Path) -> None:
    again = scfm.load(place / "run" / "model")
    assert again.files.genes_read == tuned.files.genes_read
    np.testing.assert_array_equal(embedding(again, cells(30, 1)), embedding(tuned, cells(30, 1)))


def test_shards_and_cells_in_memory_teach_the_same(
    model: scfm.PretrainedModel, tuned: scfm.PretrainedModel, place: Path, tmp_path: Path
) -> None:
    """The batches of the shards have other names in the same order."""
    keys = {
        **QUICK,
        "task": TASK,
        "from": model.source,
        "out": str(tmp_path / "run"),
        "data": {"shards": str(place / "shards"), "cells_per_batch": 32},
    }
    folder = finetune(read_recipe(bundled("finetune/integration.yaml"), keys, like(model.files)))
    assert read_model(folder).cell_conditions == {"batch": ["batch0", "batch1"]}
    ours, theirs = read_weights(tuned.source), read_weights(folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


def test_batches_that_are_numbers_are_names(
    model: scfm.PretrainedModel, tuned: scfm.PretrainedModel, tmp_path: Path
) -> None:
    numbered = cells()
    numbered.obs["batch"] = numbered.obs["batch"].astype(int)
    other = model.finetune(numbered, TASK, out=str(tmp_path / "run"), **QUICK)
    assert other.files.cell_conditions == tuned.files.cell_conditions == {"batch": ["10", "3"]}
    np.testing.assert_array_equal(embedding(other, numbered), embedding(tuned, cells()))
    np.testing.assert_array_equal(embedding(tuned, numbered), embedding(tuned, cells()))


def test_only_the_genes_that_vary_are_read_and_zeros_among_them(tuned: scfm.PretrainedModel) -> None:
    read = tuned.files.genes_read
    assert read is not None
    assert len(read) == N_GENES
    some = cells(20, 1)
    for pack in tuned.packs(tuned.store(some), tuned.conditions_of(some), 16384):
        assert pack.lengths.tolist() == [N_GENES + 1] * 20
        names = [tuned.files.vocabulary.entries[gene].id for gene in pack.genes[1 : N_GENES + 1].tolist()]
        assert names == sorted(read)
        counts = np.asarray(some[:, names].X.todense())
        assert ((pack.values.view(20, -1)[:, 1:] > 0).numpy() == (counts > 0)).all()
    others = some.copy()
    columns = [GENES.index(name) for name in GENES if name not in read]
    dense = others.X.toarray()
    dense[:, columns] += 7
    others.X = dense
    np.testing.assert_array_equal(embedding(tuned, others), embedding(tuned, some))
    np.testing.assert_array_equal(embedding(tuned, some[:, read]), embedding(tuned, some))


def test_the_genes_are_those_that_the_baselines_would_choose(tuned: scfm.PretrainedModel) -> None:
    adata = cells()
    store = store_from_anndata(adata, tuned.files.vocabulary, obs_columns=["batch"])
    rows = np.random.default_rng(0).permutation(120)[:70]
    expression, enough = log_expression(store, rows)
    expected = ExpressionRule.learn(adata).apply(adata[rows])
    assert [gene.id for gene in tuned.files.vocabulary.entries[:60]] == adata.var_names.tolist()
    np.testing.assert_allclose(expression.toarray(), expected.toarray(), rtol=1e-12)
    batches = adata.obs["batch"].to_numpy(dtype=str)[rows]
    np.testing.assert_array_equal(
        enough[highly_variable(expression[:, enough], 20, batches)], highly_variable(expected, 20, batches)
    )


def test_the_value_heads_predict_at_first_what_they_did_before(
    model: scfm.PretrainedModel, tuned: scfm.PretrainedModel, place: Path
) -> None:
    """They read the batch besides, with weights of zero, so that the pretrained model is where training starts."""
    network = tuned.files.build()
    recipe = read_recipe(place / "run" / "recipe.yaml")
    start(network, tuned.files, model.files, recipe, fresh=["backbone.cell_conditions.", "backbone.input_norm."])
    pretrained, now = read_weights(model.source), network.state_dict()
    for name in (name for name in pretrained if name.startswith(("heads.gep.", "heads.gepc."))):
        kept = tuple(slice(size) for size in pretrained[name].shape)
        assert torch.equal(now[name][kept], pretrained[name])
        assert now[name].count_nonzero() == pretrained[name].count_nonzero()
    assert now["heads.gep.linear1.weight"].shape == (16, 32)
    assert now["heads.gepc.project.weight"].shape == (32, 16)


def test_cells_of_an_unseen_batch_get_the_statistics_of_all_batches_together(tuned: scfm.PretrainedModel) -> None:
    known, unseen, unnamed = cells(12, 1), cells(12, 1), cells(12, 1)
    unseen.obs["batch"] = "another"
    del unnamed.obs["batch"]
    found = embedding(tuned, unseen)
    assert np.abs(found - embedding(tuned, known)).max() > 1e-4
    np.testing.assert_array_equal(found, embedding(tuned, unnamed))
    assert tuned.embed(unseen).uns["scfm"]["cells_of_unknown_condition"] == {"batch": 12}
    # the rule in numpy: the mean, and the variance, of cells drawn from each batch equally often
    together = scfm.PretrainedModel(deepcopy(tuned.network), tuned.files, "all batches are one")
    norm: Any = together.network.get_submodule("backbone.input_norm")
    mean, var = norm.running_mean.numpy().copy(), norm.running_var.numpy().copy()
    second_moment = (var + mean**2).mean(0)
    norm.running_mean[:] = torch.from_numpy(mean.mean(0))
    norm.running_var[:] = torch.from_numpy(second_moment - mean.mean(0) ** 2)
    np.testing.assert_allclose(found, embedding(together, known), atol=1e-5)


def test_an_unseen_batch_beside_known_ones_changes_nothing(tuned: scfm.PretrainedModel) -> None:
    known, mixed = cells(12, 1), cells(12, 1)
    mixed.obs["batch"] = np.where(np.arange(12) < 4, "another", mixed.obs["batch"])
    np.testing.assert_allclose(embedding(tuned, mixed)[4:], embedding(tuned, known)[4:], atol=1e-6)
    np.testing.assert_allclose(embedding(tuned, mixed[2].copy())[0], embedding(tuned, mixed)[2], atol=1e-6)


def test_decoders_read_an_unseen_batch_as_the_mean_of_all() -> None:
    condition = CellCondition(3, 4)
    vectors = condition(torch.tensor([0, 1, 2, -1]))
    torch.testing.assert_close(vectors[3], vectors[:3].mean(0))
    assert vectors[3].abs().max() > 0


def test_batches_without_a_training_cell_are_unknown() -> None:
    batches = np.array(["b", "a", "b", "only validation", "c"])
    codes, names = batch_codes(batches, np.array([0, 1, 4]))
    assert names == ["a", "b", "c"]
    assert codes.tolist() == [1, 0, 1, -1, 2]


def test_from_scratch_nothing_is_kept(model: scfm.PretrainedModel, tuned: scfm.PretrainedModel, place: Path) -> None:
    network, recipe = tuned.files.build(), read_recipe(place / "run" / "recipe.yaml")
    assert recipe.task is not None
    recipe.task.setting = "scratch"
    drawn = deepcopy(network.state_dict())
    start(network, tuned.files, model.files, recipe, fresh=["backbone.cell_conditions.", "backbone.input_norm."])
    assert all(torch.equal(tensor, drawn[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("task", "sections", "message"),
    [
        ({"batch": "donor"}, {}, r"has no obs column donor; it has cell_type, batch"),
        ({"setting": "lora"}, {}, r"task\.setting: lora is none of integration"),
        ({"genes": 0}, {}, r"task\.genes: 0 is none"),
        ({}, {"objectives": [{"name": "gepc"}]}, r"objectives: gep is missing"),
    ],
)
def test_what_cannot_work_is_named(
    model: scfm.PretrainedModel, task: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ScfmError, match=message):
        model.finetune(cells(30), {**TASK, **task}, **sections)


def test_one_batch_cannot_be_integrated(model: scfm.PretrainedModel) -> None:
    alone = cells(30)
    alone.obs["batch"] = "10"
    with pytest.raises(ScfmError, match=r"obs column 'batch' names 1 batch among the training cells"):
        model.finetune(alone, TASK)


def test_scbert_is_embedded_as_it_is() -> None:
    with pytest.raises(ScfmError, match="this model is scbert; embed its cells as they are"):
        with_batch(defaults_of("scbert"), TaskConfig("integration"))


def test_models_are_judged_as_they_are_or_fine_tuned(model: scfm.PretrainedModel, tmp_path: Path) -> None:
    path, adata = Path(model.source), cells(60, 2)
    untouched = embedder(ModelInput(path, "tiny", tmp_path))
    np.testing.assert_array_equal(untouched.fit_embed(adata, "batch", 0), embedding(model, adata))  # type: ignore[attr-defined]
    integrated = embedder(ModelInput(path, "tiny", tmp_path, "full", {**QUICK, "task": {"genes": N_GENES}}))
    found = integrated.fit_embed(adata, "batch", 0)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(found, embedding(scfm.load(tmp_path / "integration-seed0" / "model"), adata))
    assert EMBEDDING not in adata.obsm
    assert "transductive" in integrated.describe()
    with pytest.raises(ScfmError, match="--setting probe: is none of integration; choose zero_shot, full, scratch"):
        embedder(ModelInput(path, "tiny", tmp_path, "probe"))
    with pytest.raises(ScfmError, match="by the obs column of the batches"):
        integrated.fit_embed(adata, None, 0)  # type: ignore[attr-defined]
