"""What a model puts out, and what its parts do to a token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from packs import N_BINS, N_GENES, PAD, random_pack

from scfm.data.batch import PackedBatch
from scfm.model import MODELS, ScGPT
from scfm.model.heads import HeadSpec, ProductDecoder
from scfm.model.pooling import pool
from scfm.recipe import ModelConfig

HEADS = [HeadSpec("gep", "gep"), HeadSpec("gepc", "gepc"), HeadSpec("annotation", "cls", 3, ["a", "b", "c"])]


def small_model(heads: list[HeadSpec] = HEADS, cell: dict[str, int] | None = None, **options: Any) -> ScGPT:
    torch.manual_seed(0)
    gene = options.pop("gene", {})
    options.setdefault("cell_conditions", list(cell or {}))
    config = ModelConfig(width=16, heads=4, layers=2, hidden=24, **options)
    return ScGPT(config, N_GENES + 2, PAD, N_BINS, cell or {}, gene, heads).eval()


def pack(**conditions: Any) -> PackedBatch:
    return random_pack([6, 3, 1, 6], [2, 3, 1, 2], **conditions)


def test_output_shapes() -> None:
    batch = pack()
    output = small_model()(batch)
    assert output.tokens.shape == (16, 16)
    assert output.cell.shape == (4, 16)
    shapes = {name: tuple(tensor.shape) for name, tensor in output.predictions.items()}
    assert shapes == {"gep": (8,), "gepc": (8,), "annotation": (4, 3)}


def test_state_dict_is_backbone_and_heads() -> None:
    model = small_model(cell={"batch": 2}, gene={"perturbation": 3})
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "heads"}
    assert {name.split(".")[1] for name in model.state_dict() if name.startswith("heads")} == {
        "gep",
        "gepc",
        "annotation",
    }
    assert MODELS["scgpt"] is ScGPT


@pytest.mark.parametrize("value_encoder", ["continuous", "category", "scaling"])
@pytest.mark.parametrize("attention", ["generative", "full"])
def test_every_parameter_learns(value_encoder: str, attention: str) -> None:
    """A parameter without a gradient breaks DDP; so does a pack without a single unknown gene."""
    heads = [HeadSpec("gep", "gep", N_BINS), HeadSpec("gepc", "gepc", N_BINS), HEADS[2]]
    model = small_model(
        heads, cell={"batch": 2}, gene={"perturbation": 3}, value_encoder=value_encoder, attention=attention
    ).train()
    for batch in (pack(), random_pack([4, 2], [4, 2])):
        batch.cell_conditions = {"batch": torch.zeros(batch.n_cells, dtype=torch.long)}
        batch.gene_conditions = {"perturbation": torch.ones(batch.n_tokens, dtype=torch.long)}
        output = model(batch)
        sum(prediction.sum() for prediction in output.predictions.values()).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        model.zero_grad()


def test_unknown_genes_hide_their_value() -> None:
    """Whatever stands in the value of an unknown gene, the model does not read it."""
    batch = pack()
    for value_encoder in ("continuous", "category", "scaling"):
        model = small_model(value_encoder=value_encoder)
        peek = replace(batch, values=torch.where(batch.unknown_mask, batch.targets, batch.values))
        assert torch.equal(model(batch).tokens, model(peek).tokens)


def test_known_values_are_read() -> None:
    batch = pack()
    changed = replace(batch, values=batch.values.clone())
    changed.values[1] += 1  # the first known gene of the first cell
    for value_encoder in ("continuous", "category", "scaling"):
        model = small_model(value_encoder=value_encoder)
        difference = (model(batch).cell - model(changed).cell).abs().amax(-1)
        assert difference[0] > 1e-4
        assert not difference[1:].any()


def test_cell_prompt_replaces_the_first_token_and_predicts_values_only() -> None:
    batch, model = pack(), small_model()
    with torch.no_grad():
        genes = model.backbone.gene_embedding(batch.genes)
        starts = batch.cu_seqlens[:-1].long()
        own = model.backbone.embed(genes, batch, None, None)[starts]
        first, same = model(batch), model(batch, cell_prompt=own)
        other = model(batch, cell_prompt=first.cell)
    assert list(same.predictions) == ["gep"]
    torch.testing.assert_close(same.predictions["gep"], first.predictions["gep"])
    assert (other.predictions["gep"] - first.predictions["gep"]).abs().max() > 1e-4


def test_bypass_of_the_output_projection_is_for_unknown_genes_only() -> None:
    batch = pack()
    model = small_model(unknown_output_projection=False)
    before = model(batch).tokens
    with torch.no_grad():
        model.backbone.blocks[-1].out_proj.bias += 1.0
        model.backbone.blocks[-1].out_proj.weight.mul_(-1.0)
    changed = (model(batch).tokens - before).abs().amax(-1) > 1e-6
    assert torch.equal(changed, ~batch.unknown_mask)


def test_cell_conditions_reach_value_decoders_but_not_the_encoder() -> None:
    model = small_model(cell={"batch": 3})
    codes = torch.tensor([0, 1, 2, 0])
    here = model(pack(cell_conditions={"batch": codes}))
    there = model(pack(cell_conditions={"batch": (codes + 1) % 3}))
    assert torch.equal(here.tokens, there.tokens)
    assert torch.equal(here.predictions["annotation"], there.predictions["annotation"])
    for name in ("gep", "gepc"):
        assert (here.predictions[name] - there.predictions[name]).abs().max() > 1e-4


def test_cell_without_a_known_condition_gets_the_mean_of_all() -> None:
    model = small_model(cell={"batch": 3})
    batch = pack(cell_conditions={"batch": torch.tensor([0, -1, 2, -1])})
    condition = model.backbone.conditions(batch, batch.cu_seqlens[:-1].long())
    known = pack(cell_conditions={"batch": torch.tensor([0, 1, 2, 0])})
    every = model.backbone.conditions(known, known.cu_seqlens[:-1].long())
    assert condition is not None
    assert every is not None
    torch.testing.assert_close(condition[[0, 2]], every[[0, 2]])
    torch.testing.assert_close(condition[1], every[:3].mean(0))
    torch.testing.assert_close(condition[3], every[:3].mean(0))


def test_gene_condition_zero_adds_nothing() -> None:
    plain, model = small_model(), small_model(gene={"perturbation": 2})
    model.load_state_dict(plain.state_dict(), strict=False)
    none = torch.zeros(16, dtype=torch.long)
    flagged = none.clone()
    flagged[1] = 1
    assert torch.equal(model(pack(gene_conditions={"perturbation": none})).tokens, plain(pack()).tokens)
    changed = model(pack(gene_conditions={"perturbation": flagged})).cell - plain(pack()).cell
    assert changed[0].abs().max() > 1e-4
    assert not changed[1:].any()


def test_gepc_computes_the_inner_product_through_either_side() -> None:
    torch.manual_seed(0)
    head = ProductDecoder(HeadSpec("gepc", "gepc"), 8, 12)
    genes, cells, cell_of_gene = torch.randn(5, 8), torch.randn(2, 12), torch.tensor([0, 0, 1, 1, 1])
    query = torch.sigmoid(genes @ head.query.weight.T + head.query.bias)
    expected = ((query @ head.project.weight.T) * cells[cell_of_gene]).sum(-1)
    torch.testing.assert_close(head(genes, cells, cell_of_gene).values, expected)


@pytest.mark.parametrize("style", ["mean", "weighted"])
def test_pooling_leaves_unknown_genes_out(style: Any) -> None:
    batch = pack()
    tokens = torch.randn(16, 16)
    poisoned = torch.where(batch.unknown_mask[:, None], 1e6, tokens)
    torch.testing.assert_close(pool(style, tokens, batch), pool(style, poisoned, batch))
    weights = batch.values[:2, None] if style == "weighted" else torch.tensor([[0.5], [0.5]])
    expected = (weights * tokens[:2]).sum(0)
    expected = expected / expected.norm() if style == "weighted" else expected
    torch.testing.assert_close(pool(style, tokens, batch)[0], expected)


def test_bf16_autocast_stays_close_to_float32() -> None:
    batch, model = pack(), small_model()
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(batch)
    assert rounded.cell.dtype == torch.float32
    assert (rounded.cell - exact.cell).abs().max() < 0.1
    assert (rounded.predictions["gep"].float() - exact.predictions["gep"]).abs().max() < 0.05
