"""What scBERT puts out, the forms its blocks take, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from packs import N_BINS, N_GENES, PAD, bin_pack
from torch import nn

from scfm.data.batch import PackedBatch
from scfm.errors import ScfmError
from scfm.model import MODELS, ScBERT, ScGPT
from scfm.model.heads import HeadSpec
from scfm.model.mixer_block import MixerBlock, ReZero, ScaleNorm
from scfm.recipe import ModelConfig, PerformerConfig

BINS = HeadSpec("masked_bin", "bins", N_BINS + 1)
BY_GENE = HeadSpec("annotation", "genes", 3, ["a", "b", "c"])
BY_CELL = HeadSpec("label", "cls", 3, ["a", "b", "c"])
HEADS = [BINS, BY_GENE, BY_CELL]


def small_model(heads: list[HeadSpec] = HEADS, options: dict[str, Any] | None = None, **form: Any) -> ScBERT:
    torch.manual_seed(0)
    shape = {"width": 12, "heads": 2, "layers": 2, "hidden": 20, "dropout": 0.0, "attention": "full"}
    performer = PerformerConfig(**{"head_width": 8, "features": 24} | form)
    config = ModelConfig(name="scbert", performer=performer, **shape | (options or {}))
    return ScBERT(config, N_GENES + 2, PAD, N_BINS, {}, {}, heads).eval()


def pack() -> PackedBatch:
    return bin_pack([6, 3, 1, 6], [2, 3, 1, 2])


def test_output_shapes() -> None:
    output = small_model()(pack())
    assert output.tokens.shape == (16, 12)
    assert output.cell.shape == (4, 12)
    shapes = {name: tuple(tensor.shape) for name, tensor in output.predictions.items()}
    assert shapes == {"masked_bin": (8, N_BINS + 1), "annotation": (4, 3), "label": (4, 3)}


def test_names_and_shapes_of_the_weights() -> None:
    """What converters and model directories rest on."""
    found = {
        name: tuple(tensor.shape) for name, tensor in small_model([BINS, BY_GENE], qkv_bias=True).state_dict().items()
    }
    block = {
        "attention_norm.weight": (12,),
        "attention_norm.bias": (12,),
        "qkv.weight": (48, 12),
        "qkv.bias": (48,),
        "mixer.projection": (24, 8),
        "out_proj.weight": (12, 16),
        "out_proj.bias": (12,),
        "feed_forward_norm.weight": (12,),
        "feed_forward_norm.bias": (12,),
        "linear1.weight": (20, 12),
        "linear1.bias": (20,),
        "linear2.weight": (12, 20),
        "linear2.bias": (12,),
    }
    expected: dict[str, tuple[int, ...]] = {
        f"backbone.blocks.{layer}.{name}": shape for layer in range(2) for name, shape in block.items()
    }
    expected |= {
        "backbone.gene_embedding.weight": (N_GENES + 2, 12),
        "backbone.value_embedding.weight": (N_BINS + 1, 12),
        "backbone.norm.weight": (12,),
        "backbone.norm.bias": (12,),
        "backbone.since_redraw": (),
        "heads.masked_bin.out.weight": (N_BINS + 1, 12),
        "heads.masked_bin.out.bias": (N_BINS + 1,),
        "heads.annotation.token.weight": (1, 12),
        "heads.annotation.token.bias": (1,),
        "heads.annotation.linear1.weight": (512, N_GENES + 1),
        "heads.annotation.linear1.bias": (512,),
        "heads.annotation.linear2.weight": (128, 512),
        "heads.annotation.linear2.bias": (128,),
        "heads.annotation.out.weight": (3, 128),
        "heads.annotation.out.bias": (3,),
    }
    assert found == expected
    assert MODELS["scbert"] is ScBERT


def test_the_published_size() -> None:
    """16,906 genes, width 200, six layers: 5,007,207 trained weights and 3,381,200 of gene2vec (one zero row apart)."""
    config = ModelConfig(
        "scbert", 200, 10, 6, 800, 0.0, attention="full", cell_embedding="mean", gene_table="gene2vec.npy"
    )
    with torch.device("meta"):
        network = ScBERT(config, 16906 + 2, 16906, 6, {}, {}, [HeadSpec("masked_bin", "bins", 7)])
    assert sum(p.numel() for p in network.parameters()) == 5_007_207
    assert network.backbone.gene_embedding.weight.shape == (16908, 200)
    head = HeadSpec("annotation", "genes", 11, list("abcdefghijk"))
    with torch.device("meta"):
        fine_tuned = ScBERT(config, 16906 + 2, 16906, 6, {}, {}, [head])
    assert sum(p.numel() for p in fine_tuned.heads.parameters()) == 8_722_761 + 129 * 11


FORMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"mixer": "linear"}, {}),
    ({"mixer": "softmax"}, {}),
    ({}, {"kernel": "relu"}),
    ({}, {"kernel": "gelu"}),
    ({}, {"kernel": "none"}),
    ({}, {"mode": "compat"}),
    ({}, {"norm": "scale", "glu": True}),
    ({}, {"norm": "rezero", "qkv_bias": True}),
    ({}, {"reversible": True, "tied": True}),
    ({"gene_table": "gene2vec.npy", "cell_embedding": "mean"}, {}),
    ({"cell_embedding": "weighted"}, {}),
]
FORM = pytest.mark.parametrize(("options", "form"), FORMS, ids=[str(form) for form in FORMS])


@FORM
def test_every_parameter_learns(options: dict[str, Any], form: dict[str, Any]) -> None:
    """A parameter without a gradient breaks DDP; so does a pack without a single hidden gene."""
    model = small_model(options=options, **form).train()
    for batch in (pack(), bin_pack([4, 2], [4, 2])):
        output = model(batch)
        sum(prediction.sum() for prediction in output.predictions.values()).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        model.zero_grad()


@FORM
def test_recomputing_blocks_changes_no_gradient(options: dict[str, Any], form: dict[str, Any]) -> None:
    gradients = []
    for recompute in (False, True):
        model = small_model(options=options, **form).train()
        model.backbone.recompute = recompute
        model(pack()).tokens.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_hidden_genes_are_read_like_all_others_and_hide_their_value() -> None:
    batch, model = pack(), small_model()
    plain = model(batch)
    for value, changes in ((batch.targets, False), (None, True)):
        if value is not None:
            other = replace(batch, targets=value + 1)  # the truth reaches nobody
        else:
            genes = batch.genes.clone()
            genes[5] = (genes[5] + 1) % N_GENES  # a hidden gene of the first cell
            other = replace(batch, genes=genes)
        difference = (model(other).tokens - plain.tokens).abs().amax(-1)
        assert bool((difference[:6] > 1e-5).all()) == changes
        assert not difference[6:].any()


def test_a_kept_value_is_read() -> None:
    """Genes that are predicted but show their value hold it in `values`."""
    batch, model = pack(), small_model()
    shown = batch.values.clone()
    shown[5] = batch.targets[5]
    assert (model(replace(batch, values=shown)).tokens - model(batch).tokens)[:6].abs().amax(-1).min() > 1e-5


def test_the_class_head_reads_genes_by_their_place_in_the_vocabulary() -> None:
    model, batch = small_model([BY_GENE]), pack()
    output = model(batch)
    head = model.heads["annotation"]
    places = torch.zeros(4, N_GENES + 1)
    numbers = torch.relu(head.token(output.tokens))[:, 0]
    for token, cell in enumerate(batch.cell_of_token.tolist()):
        gene = int(batch.genes[token])
        places[cell, N_GENES if gene >= N_GENES else gene] = numbers[token]
    assert (places != 0).any(0).sum() > 1
    assert places[:, N_GENES].any()  # <cls>
    expected = head.out(torch.relu(head.linear2(torch.relu(head.linear1(places)))))
    torch.testing.assert_close(output.predictions["annotation"], expected)


def test_tied_logits_are_products_with_the_value_embedding() -> None:
    model, batch = small_model([BINS], tied=True), pack()
    output = model(batch)
    assert list(model.heads) == []
    expected = output.tokens[batch.predicted] @ model.backbone.value_embedding.weight.T
    torch.testing.assert_close(output.predictions["masked_bin"], expected)


def test_norms_of_branches() -> None:
    x = torch.randn(5, 12)
    scaled = ScaleNorm(12)(x)
    torch.testing.assert_close(scaled.norm(dim=-1), torch.full((5,), math.sqrt(12)))
    torch.testing.assert_close(ReZero()(x), 1e-3 * x)
    block = small_model(norm="rezero").backbone.blocks[0]
    assert isinstance(block, MixerBlock)
    assert not any(isinstance(module, nn.LayerNorm) for module in block.modules())


def test_a_given_gene_table_is_no_parameter_but_stands_among_the_weights() -> None:
    model = small_model(options={"gene_table": "gene2vec.npy"})
    assert "backbone.gene_embedding.weight" in model.state_dict()
    assert "backbone.gene_embedding.weight" not in dict(model.named_parameters())
    assert not model.backbone.gene_embedding.weight.any()


def test_dropout_reaches_embeddings_and_both_branches() -> None:
    model = small_model(options={"dropout": 0.5}).train()
    batch = pack()
    assert (model.backbone.embed(batch) == 0).float().mean() > 0.2
    assert not torch.equal(model(batch).tokens, model(batch).tokens)


def test_compat_draws_by_itself_and_alike_everywhere() -> None:
    """New features follow from the old: no global draw moves, and two processes draw the same."""
    models = [small_model(mode="compat", redraw_every=1).train() for _ in range(2)]
    first = models[0].backbone.blocks[0].mixer.projection.clone()
    for model in models:
        state = torch.get_rng_state()
        for _ in range(2):
            model(pack())
        assert torch.equal(torch.get_rng_state(), state)
    drawn = [[block.mixer.projection for block in model.backbone.blocks] for model in models]
    assert not torch.equal(drawn[0][0], first)
    assert not torch.equal(drawn[0][0], drawn[0][1])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*drawn, strict=True))
    block = drawn[0][0][:8]
    torch.testing.assert_close(block @ block.T, torch.diag((block @ block.T).diagonal()), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("mode", "redraw_every", "training"), [("compat", 1, False), ("compat", 0, True), ("correct", 1, True)]
)
def test_a_forward_pass_draws_nothing_otherwise(mode: str, redraw_every: int, training: bool) -> None:
    model = small_model(mode=mode, redraw_every=redraw_every).train(training)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for _ in range(4):
        model(pack())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "generative"}, r"model\.attention: generative; scBERT reads all genes"),
        ({"input_norm": "batch"}, r"model\.input_norm: is a setting of scGPT"),
        ({"cell_conditions": ["batch"]}, r"model\.cell_conditions: is a setting of scGPT"),
        ({"modality": "assay", "padded_batches": True}, r"(?s)model\.modality: .*model\.padded_batches: "),
        ({"value_encoder": "category"}, r"model\.value_encoder: is a setting of scGPT"),
    ],
)
def test_settings_of_scgpt_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ScfmError, match=message):
        small_model(options=options)


def test_heads_and_conditions_that_scbert_lacks_are_refused() -> None:
    with pytest.raises(ScfmError, match="objectives: gep needs a head of scGPT"):
        small_model([HeadSpec("gep", "gep")])
    config = small_model().backbone.config
    with pytest.raises(ScfmError, match=r"data\.gene_conditions: scBERT reads none, here pathway"):
        ScBERT(config, N_GENES + 2, PAD, N_BINS, {}, {"pathway": 3}, [])


@pytest.mark.parametrize(
    ("options", "heads", "message"),
    [
        ({"mixer": "linear"}, [], r"model\.mixer: is a setting of scBERT"),
        ({"gene_table": "gene2vec.npy"}, [], r"model\.gene_table: is a setting of scBERT"),
        ({}, [BINS, BY_GENE], "(?s)masked_bin needs a head of scBERT.*annotation needs a head of scBERT"),
    ],
)
def test_scgpt_refuses_what_is_scberts(options: dict[str, Any], heads: list[HeadSpec], message: str) -> None:
    with pytest.raises(ScfmError, match=message):
        ScGPT(ModelConfig(width=16, heads=4, layers=1, hidden=8, **options), N_GENES + 2, PAD, N_BINS, {}, {}, heads)


@FORM
def test_bf16_autocast_stays_close_to_float32(options: dict[str, Any], form: dict[str, Any]) -> None:
    batch, model = pack(), small_model(options=options, **form)
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(batch)
    assert rounded.cell.dtype == torch.float32
    assert (rounded.cell - exact.cell).abs().max() < 0.1
    assert (rounded.predictions["masked_bin"].float() - exact.predictions["masked_bin"]).abs().max() < 0.1
