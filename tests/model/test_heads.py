"""Heads against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from packs import N_BINS, N_GENES, PAD, random_pack

from scfm.errors import ScfmError
from scfm.model import ScGPT
from scfm.model.heads import HeadSpec, build_head
from scfm.recipe import ModelConfig


def model_with(
    *heads: HeadSpec, cell: dict[str, int] | None = None, gene: dict[str, int] | None = None, **options: object
) -> ScGPT:
    torch.manual_seed(0)
    config = ModelConfig(width=16, heads=4, layers=2, hidden=24, dropout=0.0, **options)  # type: ignore[arg-type]
    return ScGPT(config, N_GENES + 2, PAD, N_BINS, cell or {}, gene or {}, list(heads))


def test_expressed_or_not_is_read_from_the_same_tokens_by_a_decoder_of_its_own() -> None:
    head = build_head(HeadSpec("gep", "gep", nonzero=True), 8, 12, N_BINS)
    tokens = torch.randn(5, 12)
    hidden = F.leaky_relu(head.nonzero.linear2(F.leaky_relu(head.nonzero.linear1(tokens))))
    torch.testing.assert_close(head(tokens).nonzero, head.nonzero.out(hidden)[:, 0])


def test_expressed_or_not_from_the_cell_is_an_inner_product_with_bias() -> None:
    torch.manual_seed(0)
    head = build_head(HeadSpec("gepc", "gepc", nonzero=True), 8, 12, N_BINS)
    genes, cells, cell_of_gene = torch.randn(5, 8), torch.randn(2, 12), torch.tensor([0, 0, 1, 1, 1])
    query = torch.sigmoid(head.query(genes))
    expected = (head.nonzero(query) * cells[cell_of_gene]).sum(-1)
    torch.testing.assert_close(head(genes, cells, cell_of_gene).nonzero, expected)


@pytest.mark.parametrize(
    ("query", "reaches"), [("product", True), ("detached product", False), ("concat", True), ("sum", True)]
)
def test_only_the_detached_query_keeps_its_gradient_from_the_genes(query: str, reaches: bool) -> None:
    head = build_head(HeadSpec("gepc", "gepc", query=query), 12, 12, N_BINS)  # type: ignore[arg-type]
    genes, cells = torch.randn(5, 12, requires_grad=True), torch.randn(2, 12, requires_grad=True)
    values = head(genes, cells, torch.tensor([0, 0, 1, 1, 1])).values
    assert values.shape == (5,)
    values.sum().backward()
    assert (genes.grad is not None) == reaches
    assert cells.grad is not None


@pytest.mark.parametrize(
    "spec", [HeadSpec("g", "gepc", query="sum", nonzero=True), HeadSpec("g", "gepc", 5, query="concat")]
)
def test_small_queries_predict_values_only(spec: HeadSpec) -> None:
    with pytest.raises(ScfmError, match="choose query `product`"):
        build_head(spec, 8, 8, N_BINS)


def test_affine_values_start_from_the_input() -> None:
    torch.manual_seed(0)
    spec = HeadSpec("gep", "gep", affine=True, activation="Softplus", adaptive_bias=True)
    head = build_head(spec, 8, 8, N_BINS)
    tokens, inputs, mean = torch.randn(3, 8), torch.tensor([0.0, 1.0, 2.5]), torch.tensor([1.5, 1.5, 2.0])
    a, b = F.softplus(head.coefficient(tokens).values), F.softplus(head.bias(tokens))
    torch.testing.assert_close(head(tokens, inputs, mean).values, a * inputs + b * mean)
    with pytest.raises(ScfmError, match="no activation 'Sofplus'"):
        build_head(HeadSpec("gep", "gep", affine=True, activation="Sofplus"), 8, 8, N_BINS)


def test_the_mean_input_of_a_cell_counts_its_non_zero_values() -> None:
    model = model_with(HeadSpec("gep", "gep", affine=True, adaptive_bias=True), attention="full")
    batch = random_pack([4, 3], [1, 1])
    batch.values = torch.tensor([0.0, 3.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    seen: list[torch.Tensor] = []
    model.heads["gep"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    model(batch)
    assert seen[0].tolist() == [2.0, 2.0, 2.0, 0.0, 0.0]


def test_the_domain_head_hands_down_the_opposite_gradient() -> None:
    torch.manual_seed(0)
    head = build_head(HeadSpec("dar", "domain", 3, ["x", "y", "z"]), 8, 8, N_BINS)
    cells = torch.randn(4, 8, requires_grad=True)
    plain = head.out(head.hidden(cells))
    torch.testing.assert_close(head(cells), plain)
    (forward,), (reversed_,) = (torch.autograd.grad(y.square().sum(), cells) for y in (plain, head(cells)))
    torch.testing.assert_close(reversed_, -forward)


def test_every_part_of_every_head_learns() -> None:
    """No parameter is left without a gradient: data-parallel training would wait for it forever."""
    heads = [
        HeadSpec("gep", "gep", nonzero=True),
        HeadSpec("gepc", "gepc", nonzero=True, query_reads_conditions=True),
        HeadSpec("annotation", "cls", 2, ["a", "b"], layers=2),
        HeadSpec("dar", "domain", 2, ["x", "y"]),
    ]
    options = {"input_norm": "domain", "domain": "donor", "modality": "assay", "cell_conditions": ["batch"]}
    model = model_with(*heads, cell={"batch": 2, "donor": 2}, gene={"assay": 3, "pathway": 2}, **options)
    batch = random_pack([6, 5], [2, 3])
    batch.cell_conditions = {"batch": torch.tensor([0, 1]), "donor": torch.tensor([1, 0])}
    batch.gene_conditions = {"assay": torch.arange(11) % 3, "pathway": torch.ones(11, dtype=torch.long)}
    output = model.train()(batch)
    assert set(output.predictions) == {"gep", "gep_nonzero", "gepc", "gepc_nonzero", "annotation", "dar"}
    sum(prediction.square().sum() for prediction in output.predictions.values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_the_modality_reaches_value_decoders_but_not_the_encoder() -> None:
    model = model_with(HeadSpec("gep", "gep"), HeadSpec("gepc", "gepc"), gene={"assay": 2}, modality="assay").eval()
    batch = random_pack([6, 5], [2, 3])
    batch.gene_conditions = {"assay": torch.zeros(11, dtype=torch.long)}
    plain = model(batch)
    where = batch.predicted
    batch.gene_conditions["assay"][where[0]] = 1
    other = model(batch)
    assert torch.equal(plain.tokens, other.tokens)
    changed = plain.predictions["gep"] != other.predictions["gep"]
    assert changed.tolist() == [True] + [False] * (len(where) - 1)
    assert torch.equal(plain.predictions["gepc"], other.predictions["gepc"])  # reads the modality of `<cls>`
    batch.gene_conditions["assay"][0] = 1
    assert not torch.equal(plain.predictions["gepc"], model(batch).predictions["gepc"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell_conditions": ["batch"]}, "cell condition 'batch' is not among those of the data"),
        ({"input_norm": "domain"}, "set both or neither"),
        ({"domain": "donor"}, "set both or neither"),
        ({"modality": "assay"}, "'assay' is not among the gene conditions"),
        ({"padded_batches": True}, "needs attention full"),
    ],
)
def test_forms_that_cannot_be_built(options: dict[str, object], message: str) -> None:
    with pytest.raises(ScfmError, match=message):
        model_with(cell={"donor": 2}, **options)
