"""To scGPT and back, bit by bit, and what scGPT has no place for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scgpt_folders import TOKENS, case_parts, same, write_folder
from scgpt_models import BATCHES, CLS, FORMS, GEP, GEPC, a_model
from torch import Tensor

from scfm.checkpoints.native import ModelFiles, as_plain
from scfm.checkpoints.scgpt.names import layout_of
from scfm.checkpoints.scgpt.reading import read_scgpt
from scfm.checkpoints.scgpt.writing import to_scgpt, write_scgpt
from scfm.data.tokens import TokenConfig
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.errors import ScfmError
from scfm.model.heads import HeadSpec

CASES = [
    "batch_dsbn_zeroprob_dab",
    "category_values",
    "cell_emb_avgpool",
    "cell_emb_wpool",
    "flash_prenorm",
    "generative_pcpt_gen",
    "multiomic_mod_batch",
    "multiomic_mod_only",
    "mvc_continuous_zeroprob",
    "perturb_generator",
    "perturb_generator_adaptive_mvc",
    "perturb_generator_zeroprob",
    "plain_batchnorm",
    "scaling_values",
]


def exported(folder: Path, files: ModelFiles, weights: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Export a model and return the tensors of the file."""
    write_scgpt(folder, to_scgpt(files, weights, **options))
    return torch.load(folder / "best_model.pt", weights_only=True)


def same_meaning(first: ModelFiles, second: ModelFiles) -> bool:
    """Say whether all files of two models say the same, weights aside."""
    plain = [json.loads(json.dumps(as_plain(files))) for files in (first, second)]
    hashes = [None if files.cell_hashes is None else files.cell_hashes.tolist() for files in (first, second)]
    return plain[0] == plain[1] and hashes[0] == hashes[1] and first.card == second.card


@pytest.mark.parametrize("form", FORMS)
def test_native_to_scgpt_and_back(tmp_path: Path, form: str) -> None:
    files, weights = a_model(form)
    files.cell_hashes = np.array([3, 5, 2**63], np.uint64)
    exported(tmp_path / "out", files, weights)
    again, back, _ = read_scgpt(tmp_path / "out")
    assert same(back, weights)
    assert same_meaning(again, files)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "args.json",
        "best_model.pt",
        "cells.hash",
        "scfm.json",
        "vocab.json",
    ]


@pytest.mark.parametrize("form", FORMS)
def test_an_export_is_complete_without_scfm_json(tmp_path: Path, form: str) -> None:
    """Its args.json announces all of its parts, so it converts as any checkpoint of scGPT; <eoc> comes with it."""
    files, weights = a_model(form)
    exported(tmp_path / "out", files, weights)
    (tmp_path / "out/scfm.json").unlink()
    flagged = files.model.attention == "generative" or form in ("modality", "perturbation")
    again, back, _ = read_scgpt(tmp_path / "out", drop=[] if flagged else ["flag_encoder.*"])
    name = "backbone.gene_embedding.embedding.weight"
    assert torch.equal(back[name], torch.cat([weights[name], torch.zeros(1, 16)]))
    ours = {key.replace("donor", "batch"): tensor for key, tensor in weights.items() if key != name}
    assert same({key: tensor for key, tensor in back.items() if key != name}, ours)
    assert [head.kind for head in again.heads] == [head.kind for head in files.heads]
    assert again.model == replace(
        files.model,
        cell_conditions=["batch"] * len(files.model.cell_conditions),
        domain=files.model.domain and "batch",
        unknown_output_projection=files.model.attention == "full",
    )


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_scgpt_to_native_and_back(shared: Path, tmp_path: Path, name: str) -> None:
    state, args = case_parts(shared / "golden/scgpt" / name)
    files, weights, _ = read_scgpt(write_folder(tmp_path / "original", state, args))
    back = exported(tmp_path / "back", files, weights)
    flash = {layout_of(state)[1][key]: tensor for key, tensor in state.items()}
    unread = "decoder.bias_decoder.zero_logit."  # kept nowhere, as scGPT computes nothing with it
    assert same(*({key: t for key, t in each.items() if not key.startswith(unread)} for each in (back, flash)))
    for key in (key for key in back if key.startswith(unread)):
        assert torch.equal(back[key], back[key.replace("bias_decoder", "coeff_decoder")])
    vocabularies = [json.loads((tmp_path / place / "vocab.json").read_text()) for place in ("original", "back")]
    assert vocabularies[0] == vocabularies[1]
    again, same_weights, _ = read_scgpt(tmp_path / "back")
    assert same(same_weights, weights)
    assert same_meaning(again, files)


@pytest.mark.golden
def test_a_permuted_vocabulary_and_the_unused_flag_come_back(shared: Path, tmp_path: Path) -> None:
    folder = shared / "golden/scgpt/checkpoint_tiny"
    state = torch.load(folder / "best_model.pt", weights_only=True)
    order = [199, 5, 197, *range(5), 198, *range(6, 197)]
    state["encoder.embedding.weight"] = state["encoder.embedding.weight"][order]
    tokens = {TOKENS[i]: row for row, i in enumerate(order)}
    original = write_folder(tmp_path / "original", state, json.loads((folder / "args.json").read_text()), tokens)
    files, weights, _ = read_scgpt(original)
    assert same(exported(tmp_path / "back", files, weights), state)
    assert json.loads((tmp_path / "back/vocab.json").read_text()) == tokens
    assert state["flag_encoder.weight"][0].abs().max() > 0


@pytest.mark.golden
def test_a_fine_tuned_category_model_gets_its_row_of_padding_back(shared: Path, tmp_path: Path) -> None:
    state, args = case_parts(shared / "golden/scgpt/category_values")
    original = write_folder(tmp_path / "original", state, args | {"max_seq_len": 100})
    files, weights, _ = read_scgpt(original, preset="finetuned")
    name = "value_encoder.embedding.weight"
    assert not torch.equal(weights[f"backbone.{name}"], state[name])
    assert torch.equal(exported(tmp_path / "back", files, weights)[name], state[name])


def test_what_scgpts_loaders_expect_is_added(tmp_path: Path) -> None:
    files, weights = a_model("full")
    state = exported(tmp_path / "out", files, weights)
    assert torch.equal(state["flag_encoder.weight"], torch.zeros(2, 16))
    tokens = json.loads((tmp_path / "out/vocab.json").read_text())
    assert list(tokens) == [*(f"G{i:02}" for i in range(19)), "TP53", "<pad>", "<cls>", "<eoc>"]
    assert state["encoder.embedding.weight"].shape == (23, 16)
    assert state["encoder.embedding.weight"][22].abs().max() == 0
    args = json.loads((tmp_path / "out/args.json").read_text())
    read_by_embed_data = ("embsize", "nheads", "d_hid", "nlayers", "n_layers_cls", "dropout", "pad_token", "pad_value")
    assert [args[key] for key in read_by_embed_data] == [16, 2, 24, 2, 2, 0.2, "<pad>", -2]


def test_a_tensor_is_saved_alone(tmp_path: Path) -> None:
    """A view would take all of its storage into the file."""
    files, weights = a_model("batches")
    large = torch.zeros(10**6)
    weights["backbone.gene_embedding.norm.bias"] = large[:16]
    exported(tmp_path / "out", files, weights)
    assert (tmp_path / "out/best_model.pt").stat().st_size < 10**6


def with_(
    form: str, heads: list[HeadSpec] | None = None, conditions: dict[str, Any] | None = None, **model: Any
) -> Any:
    files, _ = a_model(form)
    changed = replace(files, model=replace(files.model, **model), heads=heads or files.heads, **(conditions or {}))
    return changed, changed.build().state_dict()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (with_("full", activation="gelu"), "model.activation gelu: scGPT has relu"),
        (
            with_("full", conditions={"tokens": TokenConfig(values="log2")}),
            "data.values log2: scGPT bins values by their quantiles",
        ),
        (
            with_("full", conditions={"cell_conditions": {"a": ["x"], "b": ["y"]}}, cell_conditions=["a", "b"]),
            "the cell conditions a, b: scGPT has one, the batch",
        ),
        (
            with_(
                "batches",
                conditions={"cell_conditions": BATCHES | {"lab": ["x", "y", "z"]}},
                domain="lab",
            ),
            "the cell conditions donor, lab: scGPT has one",
        ),
        (
            with_("full", conditions={"gene_conditions": {"pathway": ["none", "glycolysis"]}}),
            "the gene conditions pathway: scGPT has perturbation and modality",
        ),
        (
            with_("full", [HeadSpec("gep", "gep", 11), GEPC]),
            "head gep predicts bins by cross-entropy, where scGPT predicts a value; --drop 'heads.gep.*' leaves it",
        ),
        (
            with_("full", [GEP, CLS, HeadSpec("tissue", "cls", 2, ["a", "b"])]),
            "2 heads of kind cls, where scGPT has one; --drop 'heads.annotation.*' or 'heads.tissue.*'",
        ),
        (
            with_("full", [GEP, HeadSpec("gepc", "gepc", nonzero=True)]),
            "one of gep and gepc has zero probabilities, where scGPT gives them to both or none",
        ),
        (
            with_("batches", [GEP, HeadSpec("dar", "domain", 2, ["a", "b"])]),
            "head dar tells 2 domains, where scGPT tells the 3 batches; --drop 'heads.dar.*'",
        ),
        (
            with_("full", [GEP, HeadSpec("dar", "domain", 2, ["a", "b"], layers=2)]),
            "head dar has 2 layers, where scGPT has 3",
        ),
        (
            with_("modality", [GEP, GEPC]),
            "head gepc reads no conditions in its query, as scGPT's multi-omic model does",
        ),
        (
            with_("batches", [GEP, HeadSpec("gepc", "gepc", query="sum")]),
            "head gepc has a sum query and conditions, where scGPT's takes none",
        ),
        (with_("perturbation", [GEP]), "head gep is not affine, as in scGPT's perturbation model"),
        (
            with_("perturbation", input_norm="batch", attention="generative", value_encoder="scaling"),
            "an input norm: scGPT's perturbation model cannot have that\n  the value encoder scaling: scGPT's",
        ),
        (
            with_("perturbation", conditions={"gene_conditions": {"perturbation": ["none", "perturbed"]}}),
            "the gene condition perturbation: scGPT's has none, perturbed, padding",
        ),
        (
            with_("full", [HeadSpec("gep", "gep", affine=True)]),
            "no gene condition perturbation: scGPT's perturbation model cannot have that",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_scgpt_cannot_hold(model: tuple[ModelFiles, dict[str, Tensor]], message: str) -> None:
    with pytest.raises(ScfmError) as caught:
        to_scgpt(*model)
    assert str(caught.value).startswith("scGPT cannot hold this model:\n  ")
    assert message in str(caught.value)


def test_heads_can_be_left_behind(tmp_path: Path) -> None:
    files, weights = with_("full", [HeadSpec("gep", "gep", 11), GEPC, CLS])
    export = to_scgpt(files, weights, ["heads.gep.*"])
    assert export.report.left_behind == [name for name in weights if name.startswith("heads.gep.")]
    assert any("no gep head" in note for note in export.report.notes)
    write_scgpt(tmp_path / "out", export)
    again, back, _ = read_scgpt(tmp_path / "out")
    assert [head.task for head in again.heads] == ["gepc", "annotation"]
    assert same(back, {name: tensor for name, tensor in weights.items() if not name.startswith("heads.gep.")})
    for drop, message in (
        (["heads.gep.out.*"], "only whole heads can be left behind"),
        (["backbone.blocks.*"], "only whole heads can be left behind"),
        (["heads.nothing.*"], "--drop heads.nothing.* matches no tensor"),
    ):
        with pytest.raises(ScfmError) as caught:
            to_scgpt(files, weights, drop)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("form", "model", "note"),
    [
        ("full", {"norm": "pre"}, "pre-norm is ignored by scGPT where flash-attn is not installed"),
        ("generative", {}, "scGPT 0.2.4 attends in full"),
        ("generative", {"unknown_output_projection": True}, "skips the output projection of unknown genes"),
        ("full", {"cell_embedding": "mean"}, "scGPT counts padding in mean and weighted cell embeddings"),
        ("domains", {}, "by the domain of its first cell"),
        ("modality", {}, "set model.use_fast_transformer = False before"),
        ("perturbation", {}, "the model is one for scgpt.model.TransformerGenerator"),
        ("category", {}, "<cls> has a value embedding of its own here"),
    ],
)
def test_what_scgpt_computes_otherwise_is_noted(form: str, model: dict[str, Any], note: str) -> None:
    assert any(note in said for said in to_scgpt(*a_model(form, **model)).report.notes)
    assert not any(note in said for said in to_scgpt(*a_model("full")).report.notes)


def test_names_that_are_not_unique_fall_back_to_ids(tmp_path: Path) -> None:
    files, weights = a_model("full")
    twins = [Gene.of("ENSG1", "TWIN"), Gene.of("ENSG2", "TWIN"), *files.vocabulary.entries[2:]]
    files = replace(files, vocabulary=Vocabulary(twins))
    exported(tmp_path / "out", files, weights)
    assert list(json.loads((tmp_path / "out/vocab.json").read_text()))[:3] == ["ENSG1", "ENSG2", "G02"]
    assert read_scgpt(tmp_path / "out")[0].vocabulary == files.vocabulary


def test_an_export_that_was_changed_is_not_read_as_the_old_model(tmp_path: Path) -> None:
    files, weights = a_model("full")
    out = tmp_path / "out"
    state = exported(out, files, weights)
    with pytest.raises(ScfmError, match=r"scfm\.json: says what scfm exported here, so no option is needed"):
        read_scgpt(out, preset="finetuned")
    trained = state | {"decoder.fc.4.bias": state["decoder.fc.4.bias"] + 1}
    shutil.copy(out / "best_model.pt", tmp_path / "kept.pt")
    torch.save(trained, out / "best_model.pt")
    with pytest.raises(ScfmError, match=r"best_model\.pt: is not what scfm exported; remove scfm\.json to read"):
        read_scgpt(out)
    shutil.copy(tmp_path / "kept.pt", out / "best_model.pt")
    vocab = json.loads((out / "vocab.json").read_text())
    (out / "vocab.json").write_text(json.dumps(vocab | {"new": 23}))
    with pytest.raises(ScfmError, match=r"vocab\.json: is not what scfm exported; remove scfm\.json to read"):
        read_scgpt(out)
    (out / "vocab.json").write_text(json.dumps(vocab))
    record = json.loads((out / "scfm.json").read_text())
    (out / "scfm.json").write_text(json.dumps({key: value for key, value in record.items() if key != "added"}))
    with pytest.raises(ScfmError, match=r"scfm\.json: lacks \['added'\]"):
        read_scgpt(out)
    record["config"]["format_version"] = 99
    (out / "scfm.json").write_text(json.dumps(record))
    with pytest.raises(ScfmError, match=r"scfm\.json: format version 99; this scfm reads 1"):
        read_scgpt(out)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/holiday.png").touch()
    with pytest.raises(ScfmError, match="is not empty; choose another directory"):
        write_scgpt(tmp_path / "out", to_scgpt(*a_model("full")))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
