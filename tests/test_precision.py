"""Inference in bf16: near float32 in every form of the model, said in provenance, refused where it would be slow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData
from cells import made_up_cells
from packs import N_BINS, N_GENES, PAD, bin_pack, random_pack
from runs import tiny_recipe, write_shards

import scfm
from scfm.cli import main
from scfm.errors import ScfmError
from scfm.model import ScBERT, ScGPT
from scfm.model import precision as precision_module
from scfm.model.heads import HeadSpec
from scfm.model.precision import at_precision
from scfm.recipe import ModelConfig, PerformerConfig
from scfm.training.run import pretrain

CPU = torch.device("cpu")
HEADS = [HeadSpec("gep", "gep"), HeadSpec("gepc", "gepc"), HeadSpec("annotation", "cls", 3, ["a", "b", "c"])]


@pytest.fixture(autouse=True)
def fast_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bf16 be computed on any machine, at whatever speed."""
    monkeypatch.setattr(precision_module, "multiplies_bf16", lambda device: True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> scfm.PretrainedModel:
    place = tmp_path_factory.mktemp("model")
    shape = {"width": 64, "heads": 2, "layers": 2, "hidden": 64}
    return scfm.load(pretrain(tiny_recipe(write_shards(place / "shards"), place / "run", model=shape)))


def embedding(model: scfm.PretrainedModel, adata: AnnData, **options: Any) -> np.ndarray:
    return model.embed(adata.copy(), **{"precision": "bf16", **options}).obsm["X_scfm"]


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_embeddings_are_near_those_of_float32_and_the_weights_stay(model: scfm.PretrainedModel) -> None:
    cells = made_up_cells(60, seed=5)
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    exact, fast = embedding(model, cells, precision="fp32"), embedding(model, cells)
    assert cosines(fast, exact).min() >= 0.999
    assert cosines(fast - fast.mean(0), exact - exact.mean(0)).min() >= 0.99  # cells of one tissue are nearly parallel
    assert (fast != exact).mean() > 0.5
    for name, tensor in model.network.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    np.testing.assert_array_equal(embedding(model, cells, precision="fp32"), exact)


def test_batch_mates_change_no_more_than_bf16_rounds(model: scfm.PretrainedModel) -> None:
    cells = made_up_cells(60, seed=5)
    together = embedding(model, cells)
    alone = np.concatenate([embedding(model, cells[[i]]) for i in (0, 17, 59)])
    np.testing.assert_allclose(alone, together[[0, 17, 59]], atol=4e-3)
    order = np.random.default_rng(0).permutation(60)
    np.testing.assert_allclose(embedding(model, cells[order]), together[order], atol=4e-3)
    for tokens_per_pack in (40, 111):
        np.testing.assert_allclose(embedding(model, cells, tokens_per_pack=tokens_per_pack), together, atol=4e-3)


def test_provenance_names_the_precision(model: scfm.PretrainedModel) -> None:
    cells = made_up_cells(4, seed=5)
    assert model.embed(cells).uns["scfm"]["precision"] == "fp32"
    assert model.embed(cells, precision="bf16").uns["scfm"]["precision"] == "bf16"


def test_predicted_probabilities_are_near(model: scfm.PretrainedModel) -> None:
    tuned = model.finetune(made_up_cells(60, seed=7), "annotation", trainer={"max_epochs": 2, "accelerator": "cpu"})
    exact = tuned.predict(made_up_cells(40, seed=8)).obsm["annotation_probabilities"]
    result = tuned.predict(made_up_cells(40, seed=8), precision="bf16")
    np.testing.assert_allclose(result.obsm["annotation_probabilities"], exact, atol=0.02)
    assert result.uns["scfm"]["precision"] == "bf16"


def test_a_device_without_bf16_products_refuses(
    model: scfm.PretrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision_module, "multiplies_bf16", lambda device: False)
    cells = made_up_cells(4, seed=5)
    for verb in (model.embed, model.predict):
        with pytest.raises(ScfmError, match=r"bf16 would be slower than fp32 here: .* use fp32"):
            verb(cells, precision="bf16")
    assert "X_scfm" not in cells.obsm
    cells.write_h5ad(tmp_path / "cells.h5ad")
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "out.h5ad"
    command = ["embed", str(tmp_path / "cells.h5ad"), "--model", str(tmp_path / "model"), "--out", str(out)]
    assert main([*command, "--precision", "bf16"]) == 2
    said = capsys.readouterr().err
    assert "bf16 would be slower than fp32 here" in said
    assert said.strip().endswith("use fp32")
    assert not out.exists()
    assert main(command) == 0


def test_an_unknown_precision_is_named(model: scfm.PretrainedModel) -> None:
    with pytest.raises(ScfmError, match=r"precision: 'fp8' is not known; choose one of fp32, bf16"):
        embedding(model, made_up_cells(4, seed=5), precision="fp8")


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "pre"},
        {"attention": "full", "cell_embedding": "mean"},
        {"cell_embedding": "weighted", "value_encoder": "category"},
        {"attention": "full", "padded_batches": True, "cell_embedding": "mean", "input_norm": "batch"},
        {"unknown_output_projection": False, "value_encoder": "scaling"},
        {"backend": "dense"},
    ],
    ids=str,
)
@pytest.mark.parametrize("known", [[40, 12, 40, 1], [9, 3, 20, 1]], ids=["all known", "unknown genes"])
def test_every_form_of_the_model_is_near(options: dict[str, Any], known: list[int]) -> None:
    torch.manual_seed(0)
    config = ModelConfig(**{"width": 64, "heads": 2, "layers": 2, "hidden": 64, **options})
    network = ScGPT(config, N_GENES + 2, PAD, N_BINS, {}, {}, HEADS).eval()
    batch = random_pack([40, 12, 40, 1], known)
    twin = at_precision(network, "bf16", CPU)
    with torch.inference_mode():
        exact, fast = network(batch), twin(batch)
    assert fast.cell.dtype == torch.float32
    assert torch.cosine_similarity(exact.cell, fast.cell).min() >= 0.999
    for name, prediction in exact.predictions.items():
        assert fast.predictions[name].dtype == torch.float32
        torch.testing.assert_close(fast.predictions[name], prediction, atol=0.05, rtol=0.05)


def test_only_the_blocks_matrices_are_copied() -> None:
    config = ModelConfig(width=16, heads=2, layers=2, hidden=16)
    network = ScGPT(config, N_GENES + 2, PAD, N_BINS, {}, {}, HEADS).eval()
    twin = dict(at_precision(network, "bf16", CPU).named_parameters())
    own = {name for name, tensor in network.named_parameters() if twin[name] is not tensor}
    matrices = ("qkv", "out_proj", "linear1", "linear2")
    assert own == {name for name in twin if name.startswith("backbone.blocks") and name.split(".")[-2] in matrices}
    assert {twin[name].dtype for name in own} == {torch.bfloat16}
    assert at_precision(network, "fp32", CPU) is network


@pytest.mark.gpu
def test_the_same_on_a_gpu(model: scfm.PretrainedModel) -> None:
    cells = made_up_cells(60, seed=5)
    there, here = scfm.load(model.source), scfm.load(model.source)
    here.device = CPU
    fast, exact = embedding(there, cells), embedding(here, cells, precision="fp32")
    assert cosines(fast, exact).min() >= 0.999


def test_unlike_types_of_weights_are_not_cast_silently() -> None:
    """Only bf16 weights take other inputs: a float64 input of a float32 layer stays an error."""
    network = ScGPT(ModelConfig(width=16, heads=2, layers=1, hidden=16), N_GENES + 2, PAD, N_BINS, {}, {}, HEADS)
    network.backbone.gene_embedding.double()
    batch = random_pack([6, 3], [6, 3])
    with pytest.raises(RuntimeError, match="dtype"):
        network.eval()(replace(batch, values=batch.values.double()))


@pytest.mark.parametrize(
    ("mixer", "form"),
    [("favor", {}), ("favor", {"mode": "compat", "glu": True}), ("linear", {"norm": "scale"}), ("softmax", {})],
    ids=str,
)
def test_scbert_in_bf16_is_near_float32(mixer: str, form: dict[str, Any]) -> None:
    """Its features, like its residuals, stay in float32."""
    torch.manual_seed(0)
    config = ModelConfig(
        name="scbert", width=32, heads=2, layers=2, hidden=32, dropout=0.0, attention="full", mixer=mixer,
        cell_embedding="mean", performer=PerformerConfig(**{"head_width": 16, **form}),
    )  # fmt: skip
    heads = [HeadSpec("masked_bin", "bins", N_BINS + 1), HeadSpec("annotation", "genes", 3, ["a", "b", "c"])]
    network = ScBERT(config, N_GENES + 2, PAD, N_BINS, {}, {}, heads).eval()
    twin, pack = at_precision(network, "bf16", CPU), bin_pack([30, 20, 9], [20, 10, 5])
    with torch.inference_mode():
        exact, fast = network(pack), twin(pack)
    assert torch.nn.functional.cosine_similarity(exact.cell, fast.cell).min() > 0.999
    assert not torch.equal(exact.cell, fast.cell)
    assert (exact.predictions["masked_bin"] - fast.predictions["masked_bin"]).abs().max() < 0.1
    assert fast.tokens.dtype == torch.float32
    assert twin.backbone.blocks[0].qkv.weight.dtype == torch.bfloat16
    if mixer == "favor":
        assert twin.backbone.blocks[0].mixer.projection.dtype == torch.float32
