"""What does not fit is listed, all of it at once, with the reason and the way out; what is left behind is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scgpt_cases import VOCABULARY
from scgpt_folders import case_parts, same
from torch import Tensor

from scfm.checkpoints.native import load_weights
from scfm.checkpoints.scgpt.reading import to_native
from scfm.errors import ScfmError

pytestmark = pytest.mark.golden

State = dict[str, Tensor]
Args = dict[str, Any]
Case = Callable[[str], tuple[State, Args]]


@pytest.fixture
def case(shared: Path) -> Case:
    return lambda name: case_parts(shared / "golden/scgpt" / name)


def refused(state: State, args: Args, **options: Any) -> str:
    with pytest.raises(ScfmError) as caught:
        to_native(state, args, VOCABULARY, **options)
    return str(caught.value)


def without(args: Args, *keys: str) -> Args:
    return {key: value for key, value in args.items() if key not in keys}


def test_an_old_fine_tune_with_bn(case: Case) -> None:
    """Newer scGPT drops bn.* without a word; here it is an error, and an option keeps it exactly."""
    state, args = case("plain_batchnorm")
    announced = to_native(state, args, VOCABULARY)[1]
    older = without(args, "domain_spec_batchnorm")
    assert refused(state, older).splitlines() == [
        "the checkpoint: tensors and args.json do not fit:",
        "  input_norm is unexpected (--allow input_norm keeps it, --drop 'bn.*' leaves it behind): args.json has no "
        "domain_spec_batchnorm or DSBN; fine-tunes from before September 2023 carry bn.*, which newer scGPT drops "
        "silently though outputs change",
        *(f"    bn.{name}" for name in ("bias (32,)", "num_batches_tracked ()", "running_mean (32,)")),
        *(f"    bn.{name}" for name in ("running_var (32,)", "weight (32,)")),
    ]
    files, kept, report = to_native(state, older, VOCABULARY, allow=["input_norm"])
    assert same(kept, announced)
    assert (files.model.input_norm, report.left_behind) == ("batch", [])
    files, weights, report = to_native(state, older, VOCABULARY, drop=["bn.*"])
    assert files.model.input_norm == "none"
    assert sorted(report.left_behind) == sorted(name for name in state if name.startswith("bn."))
    assert files.training_data["converted"]["left_behind"] == report.left_behind
    load_weights(files.build(), weights, "dropped")


@pytest.mark.parametrize(
    ("name", "keys", "part", "pattern"),
    [
        ("batch_dsbn_zeroprob_dab", ["do_dab"], "dab", "'grad_reverse_discriminator.*'"),
        ("batch_dsbn_zeroprob_dab", ["domain_spec_batchnorm"], "input_norm", "'dsbn.*'"),
        ("batch_dsbn_zeroprob_dab", ["use_batch_labels"], "batch_encoder", "'batch_encoder.*'"),
        (
            "batch_dsbn_zeroprob_dab",
            ["explicit_zero_prob"],
            "zero_prob",
            "'decoder.zero_logit.*' 'mvc_decoder.W_zero_logit.*'",
        ),
        ("mvc_continuous", ["MVC", "do_mvc"], "mvc_decoder", "'mvc_decoder.*'"),
        ("mvc_continuous", ["USE_CLS"], "cls_decoder", "'cls_decoder.*'"),
        (
            "generative_pcpt_gen",
            ["USE_GENERATIVE_TRAINING", "use_generative_training"],
            "flag_encoder",
            "'flag_encoder.*'",
        ),
        ("multiomic_mod_only", ["use_mod"], "modality", "'mod_encoder.*'"),
        (
            "perturb_generator",
            ["pert_pad_id"],
            "perturbation",
            "'pert_encoder.*' 'decoder.coeff_decoder.*' 'decoder.bias_decoder.*'",
        ),
    ],
)
def test_a_part_that_args_do_not_announce(case: Case, name: str, keys: list[str], part: str, pattern: str) -> None:
    state, args = case(name)
    expected = to_native(state, args, VOCABULARY)[1]
    less = without(args, *keys)
    message = refused(state, less)
    assert f"  {part} is unexpected (--allow {part} keeps it, --drop {pattern} leaves it behind): args.json has no" in (
        message
    )
    assert message.count("--allow") == 1
    assert same(to_native(state, less, VOCABULARY, allow=[part])[1], expected)


@pytest.mark.parametrize(
    ("name", "prefixes", "part", "head"),
    [
        ("mvc_continuous", ("cls_decoder.",), "cls_decoder", "annotation"),
        ("mvc_continuous", ("mvc_decoder.",), "mvc_decoder", "gepc"),
        ("mvc_continuous", ("decoder.",), "decoder", "gep"),
        ("generative_pcpt_gen", ("flag_encoder.",), "flag_encoder", None),
        ("plain_batchnorm", ("bn.",), "input_norm", None),
        ("batch_dsbn_zeroprob_dab", ("grad_reverse_discriminator.",), "dab", "dar"),
        ("batch_dsbn_zeroprob_dab", ("decoder.zero_logit.", "mvc_decoder.W_zero_logit."), "zero_prob", None),
    ],
)
def test_a_part_that_args_announce_in_vain(
    case: Case, name: str, prefixes: tuple[str, ...], part: str, head: str | None
) -> None:
    state, args = case(name)
    less = {tensor: value for tensor, value in state.items() if not tensor.startswith(prefixes)}
    assert f"  {part} is missing (--allow {part} converts the model without it): " in refused(less, args)
    files, weights, _ = to_native(less, args, VOCABULARY, allow=[part])
    assert head not in [spec.task for spec in files.heads]
    load_weights(files.build(), weights, "less")
    # who leaves a part behind need not say in addition that it is missing
    files, dropped, report = to_native(state, args, VOCABULARY, drop=[f"{prefix}*" for prefix in prefixes])
    assert same(dropped, weights)
    assert set(report.left_behind) == state.keys() - less.keys()


def test_without_flag_encoder_attention_is_full(case: Case) -> None:
    state, args = case("generative_pcpt_gen")
    files, _, _ = to_native(state, args, VOCABULARY, drop=["flag_encoder.*"])
    assert files.model.attention == "full"


def test_a_class_decoder_of_one_class_needs_no_announcement(case: Case) -> None:
    """scGPT 0.2.4 builds one for models without classes, its pretraining code builds none."""
    state, args = case("mvc_continuous")
    args |= {"USE_CLS": False, "n_cls": 1}
    for name in ("cls_decoder.out_layer.weight", "cls_decoder.out_layer.bias"):
        state[name] = state[name][:1].clone()
    files, _, _ = to_native(state, args, VOCABULARY)
    assert [head.n_out for head in files.heads if head.kind == "cls"] == [1]
    without_it = {name: tensor for name, tensor in state.items() if not name.startswith("cls_decoder.")}
    assert [head.kind for head in to_native(without_it, args, VOCABULARY)[0].heads] == ["gep", "gepc"]


def test_everything_that_does_not_fit_is_in_one_error(case: Case) -> None:
    state, args = case("batch_dsbn_zeroprob_dab")
    del state["transformer_encoder.layers.1.norm2.weight"], state["mvc_decoder.gene2query.bias"]
    state |= {"mystery.weight": torch.zeros(3), "cls_decoder.extra": torch.zeros(2)}
    state["encoder.enc_norm.bias"] = torch.zeros(7)
    args = without(args, "do_dab") | {"embsize": 64, "num_batch_labels": 4, "USE_GENERATIVE_TRAINING": True}
    message = refused(state, args)
    for said in (
        "flag_encoder is missing (--allow flag_encoder converts the model without it): args.json says USE_GENERATIVE",
        "dab is unexpected (--allow dab keeps it, --drop 'grad_reverse_discriminator.*' leaves it behind)",
        "transformer is incomplete; no option allows this: these are missing\n"
        "    transformer_encoder.layers.1.norm2.weight (32,)",
        "mvc_decoder is incomplete; no option allows this: these are missing\n    mvc_decoder.gene2query.bias (32,)",
        "unknown is unexpected (--drop PATTERN leaves tensors behind): scGPT has no such part\n    mystery.weight (3,)",
        "cls_decoder is unexpected (--drop PATTERN leaves tensors behind): scGPT's cls_decoder has no such tensors\n"
        "    cls_decoder.extra (2,)",
        "mis-shaped; no option allows this: tensors or args.json are another model's\n"
        "    encoder.enc_norm.bias is (7,), expected (32,)",
        "contradictory; no option allows this: is it the args.json of another model?",
        "    args.json says embsize 64, the tensors 32",
        "    args.json says num_batch_labels 4, the tensors 3",
    ):
        assert said in message, said


def test_no_option_allows_misshapen_tensors(case: Case) -> None:
    state, args = case("mvc_continuous")
    state["mvc_decoder.W.weight"] = torch.zeros(32, 16)
    for options in ({}, {"allow": ["mvc_decoder", "cls_decoder"]}):
        assert "mvc_decoder.W.weight is (32, 16), expected (32, 32)" in refused(state, args, **options)
    state, args = case("category_values")
    assert "value_encoder.embedding.weight is (53, 32), expected (13, 32)" in refused(state, args | {"n_bins": 11})


def test_parts_that_disagree_on_the_batches(case: Case) -> None:
    state, args = case("batch_dsbn_zeroprob_dab")
    state["batch_encoder.embedding.weight"] = torch.zeros(2, 32)
    message = refused(state, args)
    assert "batch_encoder for 2, dsbn for 3, grad_reverse_discriminator for 3" in message


def test_unknown_tensors_can_be_left_behind(case: Case) -> None:
    state, args = case("mvc_continuous")
    expected = to_native(state, args, VOCABULARY)[1]
    state["mystery.weight"] = torch.zeros(3)
    _, weights, report = to_native(state, args, VOCABULARY, drop=["mystery.*"])
    assert same(weights, expected)
    assert report.left_behind == ["mystery.weight"]


def test_linear_attention_is_refused(case: Case) -> None:
    state, args = case("mvc_continuous")
    state = {
        name.replace("transformer_encoder.", "transformer_encoder.fast_transformer_encoder."): tensor
        for name, tensor in state.items()
    }
    assert "linear attention (fast_transformer_backend 'linear') has no counterpart in scfm" in refused(state, args)


def test_options_that_mean_nothing_are_errors(case: Case) -> None:
    state, args = case("mvc_continuous")
    assert "--allow bn: there is no such part; choose from value_encoder, flag" in refused(state, args, allow=["bn"])
    assert "--allow encoder: there is no such part" in refused(state, args, allow=["encoder"])
    assert "--drop nothing.* matches no tensor" in refused(state, args, drop=["nothing.*"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nheads": None, "nhead": None}, "args.json has no nheads or nhead, and the tensors do not tell the heads"),
        ({"nheads": 5}, "5 heads do not divide a width of 32"),
        ({"nheads": "4"}, "nheads is '4'; expected a whole number"),
        ({"cell_emb_style": "last"}, "cell_emb_style 'last' is unknown; scGPT has cls, avg-pool, w-pool"),
        ({"input_emb_style": "category"}, "args.json says input_emb_style 'category', the tensors are those of 'cont"),
        ({"input_emb_style": "scaling"}, "value_encoder is unexpected (--allow value_encoder keeps it"),
        ({"nlayers": 12}, "args.json says nlayers 12, the tensors 3"),
        ({"d_hid": 64}, "args.json says d_hid 64, the tensors 32"),
        ({"n_layers_cls": 2}, "args.json says n_layers_cls 2, the tensors 3"),
        ({"mask_ratio": 1.5}, "must name at least one ratio, each in [0, 1)"),
    ],
)
def test_args_that_cannot_be(case: Case, changes: Args, message: str) -> None:
    state, args = case("mvc_continuous")
    assert message in refused(state, args | changes)


def test_tensors_that_are_no_scgpt_at_all() -> None:
    state = {"model.layers.0.weight": torch.zeros(2, 2)}
    message = refused(state, {"embsize": 8, "nheads": 2, "nlayers": 1, "d_hid": 8})
    assert "encoder is incomplete" in message
    assert "model.layers.0.weight (2, 2)" in message
    with pytest.raises(ScfmError, match=r"args\.json has no embsize or d_model or layer_size, and the tensors"):
        to_native(state, {"nheads": 2}, VOCABULARY)


def test_norms_of_another_kind_than_announced(case: Case) -> None:
    state, args = case("plain_batchnorm")
    message = refused(state, args | {"domain_spec_batchnorm": True})
    assert "args.json says domain_spec_batchnorm True, the tensors have a batch norm" in message
    state, args = case("batch_dsbn_zeroprob_dab")
    message = refused(state, args | {"domain_spec_batchnorm": "batchnorm"})
    assert "args.json says domain_spec_batchnorm 'batchnorm', the tensors have a domain norm" in message
