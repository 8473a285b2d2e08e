"""Checkpoints of scGPT in every layout, and of every model of its: what they are, and how their cells are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scgpt_cases import VOCABULARY
from scgpt_folders import case_parts, same, write_folder
from torch import Tensor

from scfm.checkpoints.native import load_weights
from scfm.checkpoints.scgpt.names import layout_of, pairs_of
from scfm.checkpoints.scgpt.reading import read_scgpt, to_native
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.errors import ScfmError

pytestmark = pytest.mark.golden

CASES = [
    "batch_dsbn_zeroprob_dab",
    "category_values",
    "cell_emb_avgpool",
    "flash_prenorm",
    "generative_pcpt_gen",
    "multiomic_mod_batch",
    "multiomic_mod_only",
    "mvc_continuous",
    "perturb_generator",
    "perturb_generator_adaptive_mvc",
    "perturb_generator_zeroprob",
    "plain_batchnorm",
    "scaling_values",
]
UNREAD = "decoder.bias_decoder.zero_logit."

State = dict[str, Tensor]
Args = dict[str, Any]


Case = Callable[[str], tuple[State, Args]]


@pytest.fixture
def case(shared: Path) -> Case:
    return lambda name: case_parts(shared / "golden/scgpt" / name)


@pytest.mark.parametrize(
    ("file", "layout"),
    [
        ("best_model.pt", "flash"),
        ("best_model_torch_names.pt", "torch"),
        ("best_model_main_impl_names.pt", "0.2.5"),
        ("best_model_ddp_prefix.pt", "flash, DDP"),
    ],
)
def test_all_layouts_give_the_same_model(shared: Path, file: str, layout: str) -> None:
    folder = shared / "golden/scgpt/checkpoint_tiny"
    files, weights, report = read_scgpt(folder / file)
    published, expected, _ = read_scgpt(folder)
    assert report.layout == layout
    assert same(weights, expected)
    assert (files.model, files.heads, files.vocabulary) == (published.model, published.heads, published.vocabulary)
    load_weights(files.build(), weights, file)


def test_ddp_can_hide_any_layout(shared: Path) -> None:
    folder = shared / "golden/scgpt/checkpoint_tiny"
    for file, layout in (("best_model_torch_names.pt", "torch, DDP"), ("best_model_main_impl_names.pt", "0.2.5, DDP")):
        names = torch.load(folder / file, weights_only=True)
        found, flash = layout_of(f"module.{name}" for name in names)
        assert found == layout
        assert set(flash.values()) == set(torch.load(folder / "best_model.pt", weights_only=True))


def test_a_mix_of_layouts_is_refused() -> None:
    name = "transformer_encoder.layers.0.self_attn"
    with pytest.raises(ScfmError, match=r"mixes layouts.*Wqkv\.weight twice"):
        layout_of([f"{name}.Wqkv.weight", f"{name}.in_proj_weight"])


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_of_every_model_is_converted(case: Case, name: str) -> None:
    state, args = case(name)
    files, weights, report = to_native(state, args, VOCABULARY)
    load_weights(files.build(), weights, name)
    flash = set(layout_of(state)[1].values())
    converted = {scgpt for pair in pairs_of(files) for scgpt in pair.scgpt}
    left = {tensor for tensor in flash if tensor.startswith(UNREAD)}
    assert converted == flash - left
    assert set(report.left_behind) == left
    assert report.n_tensors == len(converted)


def test_the_form_follows_tensors_and_args(case: Case) -> None:
    files, _, _ = to_native(*case("generative_pcpt_gen"), VOCABULARY)
    model = files.model
    assert (model.width, model.heads, model.layers, model.hidden, model.norm) == (32, 4, 3, 32, "post")
    assert (model.attention, model.unknown_output_projection, model.value_encoder) == (
        "generative",
        False,
        "continuous",
    )
    assert [(head.task, head.kind) for head in files.heads] == [("gep", "gep"), ("gepc", "gepc")]
    files, _, _ = to_native(*case("batch_dsbn_zeroprob_dab"), VOCABULARY)
    assert files.model.attention == "full"
    assert (files.model.cell_conditions, files.model.input_norm, files.model.domain) == (["batch"], "domain", "batch")
    assert files.cell_conditions == {"batch": ["0", "1", "2"]}
    assert [(head.task, head.n_out, head.nonzero) for head in files.heads] == [
        ("gep", 1, True),
        ("gepc", 1, True),
        ("annotation", 5, False),
        ("dar", 3, False),
    ]
    files, _, _ = to_native(*case("plain_batchnorm"), VOCABULARY)
    assert (files.model.input_norm, files.model.domain) == ("batch", None)


@pytest.mark.parametrize(
    ("style", "query"),
    [("inner product, detach", "detached product"), ("concat query", "concat"), ("sum query", "sum")],
)
def test_every_style_of_the_mvc_decoder(shared: Path, case: Case, style: str, query: str) -> None:
    decoders = load_file(shared / "golden/scgpt/mvc_decoder_styles/state_dict.safetensors")
    prefix = style.replace(",", "").replace(" ", "_") + "."
    own = {name.removeprefix(prefix): tensor for name, tensor in decoders.items() if name.startswith(prefix)}
    state, args = case("mvc_continuous")
    state = {name: tensor for name, tensor in state.items() if not name.startswith("mvc_decoder.")}
    state |= {f"mvc_decoder.{name}": tensor for name, tensor in own.items()}
    files, weights, _ = to_native(state, args | {"mvc_decoder_style": style}, VOCABULARY)
    assert next(head.query for head in files.heads if head.task == "gepc") == query
    load_weights(files.build(), weights, style)
    assert torch.equal(weights["heads.gepc.query.weight"], own["gene2query.weight"])


def test_an_mvc_decoder_of_another_style_than_args_say_is_refused(shared: Path, case: Case) -> None:
    state, args = case("mvc_continuous")
    with pytest.raises(ScfmError, match=r"says mvc_decoder_style 'sum query', the tensors are those of 'product'"):
        to_native(state, args | {"mvc_decoder_style": "sum query"}, VOCABULARY)
    with pytest.raises(ScfmError, match=r"mvc_decoder_style 'telepathy' is unknown; scGPT has inner product"):
        to_native(state, args | {"mvc_decoder_style": "telepathy"}, VOCABULARY)


def test_torch_layers_are_post_norm_whatever_args_say(case: Case) -> None:
    """scGPT ignores pre_norm on torch's own layers, which the names of layout torch give away."""
    state, args = case("mvc_continuous")
    files, _, report = to_native(state, args | {"pre_norm": True}, VOCABULARY)
    assert files.model.norm == "post"
    assert any("pre_norm" in note for note in report.notes)
    files, _, _ = to_native(*case("flash_prenorm"), VOCABULARY)
    assert files.model.norm == "pre"


# how cells are read


def test_presets(case: Case) -> None:
    state, args = case("mvc_continuous")
    args |= {"max_seq_len": 3001, "mask_ratio": 0.4, "mask_value": -1, "n_bins": 21}
    zero_shot = to_native(state, args, VOCABULARY)[0]
    assert (zero_shot.tokens.cls_value, zero_shot.tokens.max_genes, zero_shot.tokens.n_bins) == (-2, 1199, 21)
    assert (zero_shot.tokens.tie_policy, zero_shot.tokens.genes, zero_shot.value_kind) == (
        "left",
        "expressed",
        "counts",
    )
    assert zero_shot.tokens.mask_ratios == (0.4,)
    finetuned = to_native(state, args, VOCABULARY, preset="finetuned")[0]
    assert (finetuned.tokens.cls_value, finetuned.tokens.max_genes) == (0, 3000)
    del args["max_seq_len"]
    with pytest.raises(ScfmError, match="no max_seq_len, which the preset finetuned needs"):
        to_native(state, args, VOCABULARY, preset="finetuned")


def test_what_args_do_not_say_is_noted(case: Case) -> None:
    state, args = case("mvc_continuous")
    del args["n_bins"], args["dropout"]
    files, _, report = to_native(state, args, VOCABULARY)
    assert (files.tokens.n_bins, files.model.dropout) == (51, 0.2)
    assert [note for note in report.notes if "n_bins" in note]
    assert [note for note in report.notes if "dropout" in note]


def test_a_category_model_as_fine_tuned_gives_cls_the_value_of_bin_0(case: Case) -> None:
    """scGPT's fine-tuning scripts give <cls> the value 0; our table of bins has a row of its own for it."""
    state, args = case("category_values")
    original = state["value_encoder.embedding.weight"]
    name = "backbone.value_encoder.embedding.weight"
    assert torch.equal(to_native(state, args, VOCABULARY)[1][name], original)
    files, weights, _ = to_native(state, args | {"max_seq_len": 10}, VOCABULARY, preset="finetuned")
    assert torch.equal(weights[name][51], original[0])
    assert torch.equal(weights[name][[*range(51), 52]], original[[*range(51), 52]])
    padding = torch.tensor(files.training_data["converted"]["padding_row"])
    assert torch.equal(padding, original[51])


def test_perturbation_models_read_all_genes_and_raw_values(case: Case) -> None:
    files, weights, _ = to_native(*case("perturb_generator_adaptive_mvc"), VOCABULARY)
    assert (files.tokens.values, files.tokens.genes, files.value_kind) == ("raw", "all", "normalised")
    assert (files.model.attention, files.gene_conditions) == (
        "full",
        {"perturbation": ["none", "perturbed", "padding"]},
    )
    assert files.gene_tables["perturbation"] == [0] * 200
    gep = files.heads[0]
    assert (gep.affine, gep.activation, gep.adaptive_bias) == (True, "Softplus", True)
    assert weights["backbone.gene_conditions.perturbation.embedding.weight"].shape == (3, 32)


def test_modalities_are_told_by_token(case: Case) -> None:
    state, args = case("multiomic_mod_only")
    genes = [Gene.of(None, f"p_CD{i}") for i in range(3)] + VOCABULARY.entries[3:]
    files, _, _ = to_native(state, args, Vocabulary(genes))
    assert files.gene_conditions == {"modality": ["Protein", "RNA", "<pad>", "<cls>", "<eoc>"]}
    assert files.gene_tables["modality"] == [0] * 3 + [1] * 194 + [2, 3, 4]
    state["mod_encoder.embedding.weight"] = state["mod_encoder.embedding.weight"][:2].clone()
    files, _, report = to_native(state, args, VOCABULARY)
    assert files.gene_conditions == {"modality": ["0", "1"]}
    assert any("2 modalities have no names" in note for note in report.notes)


def test_names_of_classes_and_batches(case: Case) -> None:
    state, args = case("batch_dsbn_zeroprob_dab")
    named = {"labels": list("ABCDE"), "batches": ["first", "second", "third"]}
    files, _, report = to_native(state, args, VOCABULARY, **named)
    heads = {head.task: head for head in files.heads}
    assert heads["annotation"].labels == named["labels"]
    assert heads["dar"].labels == files.cell_conditions["batch"] == named["batches"]
    assert not any("numbered" in note for note in report.notes)
    with pytest.raises(ScfmError, match="--labels: 2 different names in 2 lines; the model has 5"):
        to_native(state, args, VOCABULARY, labels=["A", "B"])
    with pytest.raises(ScfmError, match="--batches: 1 different names in 3 lines; the model has 3"):
        to_native(state, args, VOCABULARY, batches=["A", "A", "A"])
    state, args = case("generative_pcpt_gen")
    with pytest.raises(ScfmError, match="--labels: the checkpoint has no cls_decoder"):
        to_native(state, args, VOCABULARY, labels=["A"])
    with pytest.raises(ScfmError, match="--batches: the checkpoint has no part that tells batches"):
        to_native(state, args, VOCABULARY, batches=["A"])


def test_half_precision_becomes_float32_and_is_noted(tmp_path: Path, case: Case) -> None:
    state, args = case("mvc_continuous")
    halves = {name: tensor.half() if name.startswith("decoder.") else tensor for name, tensor in state.items()}
    _, weights, report = read_scgpt(write_folder(tmp_path / "half", halves, args))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert "6 tensors of torch.float16 became float32" in report.notes


def test_the_card_says_what_it_came_from(shared: Path) -> None:
    files, _, _ = read_scgpt(shared / "golden/scgpt/checkpoint_tiny")
    for said in ("31,329 parameters", "55, layout flash", "best_model.pt", "preset zero_shot", "cannot be checked"):
        assert said in files.card
    json.dumps(files.training_data)
    flag = torch.load(shared / "golden/scgpt/checkpoint_tiny/best_model.pt", weights_only=True)["flag_encoder.weight"]
    assert np.array_equal(np.float32(files.training_data["converted"]["flag_row"]), flag[0].numpy())
