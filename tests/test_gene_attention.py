"""Gene attention: the column means of the attention matrices, in the user's own genes, and what tells types apart."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from cells import GENES, TYPES, made_up_cells
from runs import tiny_recipe, write_shards
from scbert_cases import Case, pack
from scbert_runs import scbert_recipe
from torch import Tensor

import scfm
from scfm.cli import main
from scfm.errors import ScfmError
from scfm.gene_attention import LAYER, GeneAttention, top_genes, write_top_genes
from scfm.model.performer import Segments
from scfm.training.run import pretrain

QUICK = {
    "data": {"cells_per_batch": 8},
    "trainer": {"max_epochs": 8, "accelerator": "cpu"},
    "optimizer": {"lr": 5e-3},
}


def scored(network: torch.nn.Module, *batches: object) -> list[np.ndarray]:
    """Return the scores of each batch, (T,) by token."""
    with GeneAttention(network, "made up") as attention, torch.inference_mode():
        for batch in batches:
            network(batch)
            attention.take(batch)
    return [scores for _, _, scores in attention.parts]


@pytest.mark.golden
def test_scores_are_the_column_means_of_the_originals_exact_maps(shared: Path) -> None:
    """Their own published path takes the map of another input, in fp16; the stored true maps are exact."""
    case = Case(shared / "golden" / "scbert" / "attention_maps")
    maps = case.tensors["true_maps_fp32"]  # (layers, 1, heads, queries, keys)
    (found,) = scored(case.model, pack(case.tensors["input_ids"]))
    np.testing.assert_allclose(found, maps.mean((0, 1, 2, 3)).numpy(), atol=2e-7, rtol=1e-4)
    assert found.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("mixer", ["favor", "linear", "softmax"])
def test_scores_are_those_of_explicit_matrices(mixer: str, tmp_path: Path) -> None:
    """The matrix is what a mixer makes of an identity in place of the values."""
    recipe = scbert_recipe(write_shards(tmp_path / "shards", 20), tmp_path / "run")
    recipe.model.mixer = mixer
    recipe.trainer.max_steps = 1
    model = scfm.load(pretrain(recipe))
    network = model.network
    store = model.store(made_up_cells(5, seed=3))
    (batch,) = model.packs(store, {}, 4096)
    matrices: list[Tensor] = []

    def explicit(module: torch.nn.Module, inputs: tuple[Tensor, Segments], output: Tensor) -> None:
        qkv = inputs[0]
        first, width = int(batch.lengths[0]), qkv.shape[-1]
        own = Segments(torch.tensor([0, first], dtype=torch.int32), first)
        columns = []
        for eye in torch.eye(first).split(width, dim=1):
            values = torch.nn.functional.pad(eye, (0, width - eye.shape[1]))[:, None].expand(-1, qkv.shape[2], -1)
            mixed = module.forward(torch.stack([*qkv[:first, :2].unbind(1), values], 1), own)  # type: ignore[operator]
            columns.append(mixed[:, :, : eye.shape[1]])
        matrices.append(torch.cat(columns, -1))  # (queries, H, keys)

    hooks = [block.mixer.register_forward_hook(explicit) for block in network.backbone.blocks]
    (found,) = scored(network, batch)
    for hook in hooks:
        hook.remove()
    expected = torch.stack(matrices).mean((0, 1, 2))
    assert len(matrices) == len(network.backbone.blocks) == 2
    np.testing.assert_allclose(found[: len(expected)], expected.numpy(), atol=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("attention")
    start = scfm.load(pretrain(scbert_recipe(write_shards(place / "shards"), place / "run")))
    tuned = start.finetune(made_up_cells(90, seed=7), **QUICK)
    tuned.save_pretrained(place / "tuned")
    return place


@pytest.fixture(scope="module")
def model(folder: Path) -> scfm.PretrainedModel:
    return scfm.load(folder / "tuned")


def test_the_layer_stands_in_the_users_genes_whatever_the_packs(model: scfm.PretrainedModel) -> None:
    cells = made_up_cells(30, seed=5)
    novel = made_up_cells(30, seed=6, genes=[f"novel{i}" for i in range(9)])
    novel.obs_names = cells.obs_names
    more = anndata.concat([cells, novel], axis="var")[:, ::-1].copy()
    more.obs = cells.obs
    alone = model.predict(cells, gene_attention=True, tokens_per_pack=70).layers[LAYER].toarray()
    found = model.predict(more, gene_attention=True)
    layer = pd.DataFrame(found.layers[LAYER].toarray(), columns=found.var_names)
    np.testing.assert_allclose(layer[GENES], alone, atol=1e-7)
    assert not layer[novel.var_names].to_numpy().any()
    assert (alone > 0).all()  # scBERT reads all genes, expressed or not
    share = alone.sum(1)  # what is missing to 1 is what `<cls>` gets
    assert ((share > 0.9) & (share < 1)).all()


def test_asking_for_attention_changes_no_prediction_and_leaves_no_trace(model: scfm.PretrainedModel) -> None:
    plain = model.predict(made_up_cells(12, seed=5))
    asked = model.predict(made_up_cells(12, seed=5), gene_attention=True)
    np.testing.assert_array_equal(plain.obsm["annotation_probabilities"], asked.obsm["annotation_probabilities"])
    assert LAYER not in plain.layers
    assert not any(module._forward_hooks for module in model.network.modules())


def with_scores(scores: np.ndarray, types: list[str]) -> AnnData:
    cells = AnnData(np.zeros(scores.shape, np.float32), obs=pd.DataFrame({"type": types}, index=list("abcd")))
    cells.var_names = ["G0", "G1", "G2"]
    cells.layers[LAYER] = scores
    return cells


def test_top_genes_are_those_that_set_a_type_apart_not_those_that_all_attend_to() -> None:
    cells = with_scores(
        np.array([[0.7, 0.3, 0.0], [0.7, 0.1, 0.2], [0.7, 0.0, 0.3], [0.7, 0.0, 0.3]]), ["A", "A", "B", "B"]
    )
    table = top_genes(cells, "type", n=2)
    assert table["gene"].tolist() == ["G1", "G0", "G2", "G0"]
    assert table["cell_type"].tolist() == ["A", "A", "B", "B"]
    first = table.iloc[0]
    assert (first["score"], first["elsewhere"], first["difference"]) == pytest.approx((0.2, 0.0, 0.2))
    assert (first["rank"], first["cells"]) == (1, 2)


def test_elsewhere_is_the_mean_over_cells_not_over_types() -> None:
    cells = with_scores(np.array([[0.9, 0, 0], [0.1, 0, 0], [0.1, 0, 0], [0.4, 0, 0]]), ["A", "B", "B", "C"])
    table = top_genes(cells, "type", n=1)
    assert table.loc[0, "elsewhere"] == pytest.approx(0.2)


def test_one_type_alone_has_nothing_to_be_told_apart_from() -> None:
    cells = with_scores(np.zeros((4, 3)), ["A"] * 4)
    with pytest.raises(ScfmError, match="all cells are of type 'A': there is no other type"):
        top_genes(cells, "type")


def test_the_table_and_the_plot_are_written(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).random((4, 3))
    cells = with_scores(scores, ["A", "A", "B", "B"])
    plot = write_top_genes(cells, "type", tmp_path / "plots")
    assert plot.read_bytes().startswith(b"\x89PNG")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "plots" / "type_top_genes.csv"), top_genes(cells, "type"))
    again = write_top_genes(with_scores(scores[::-1], ["A", "A", "B", "B"]), "type", tmp_path / "other")
    assert again.read_bytes() != plot.read_bytes()


def test_from_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_up_cells(60, seed=8).write_h5ad(tmp_path / "cells.h5ad")
    asked = ["predict", str(tmp_path / "cells.h5ad"), "--model", str(folder / "tuned")]
    plots = ["--plots", str(tmp_path / "plots")]
    assert main([*asked, "--out", str(tmp_path / "no.h5ad"), *plots]) == 2
    assert "give --gene-attention with it" in capsys.readouterr().err
    unsure = ["--unassigned-below", "0.6"]
    assert main([*asked, "--out", str(tmp_path / "out.h5ad"), "--gene-attention", *plots, *unsure]) == 0
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert written.uns["scfm"]["unassigned_below"] == 0.6
    left = written.obs["annotation"] == "Unassigned"
    assert (left == (written.obs["annotation_probability"] < 0.6)).all()
    assert written.layers[LAYER].shape == (60, 60)
    table = pd.read_csv(tmp_path / "plots" / "annotation_top_genes.csv")
    assert set(table["cell_type"]) <= {*TYPES, "Unassigned"}
    assert (tmp_path / "plots" / "annotation_top_genes.png").exists()


def test_scgpt_tells_none_and_says_so(tmp_path: Path) -> None:
    model = scfm.load(pretrain(tiny_recipe(write_shards(tmp_path / "shards"), tmp_path / "run")))
    tuned = model.finetune(made_up_cells(60, seed=7), **QUICK)
    with pytest.raises(ScfmError, match="tells no gene attention; only the mixers of scBERT's blocks"):
        tuned.predict(made_up_cells(5), gene_attention=True)
