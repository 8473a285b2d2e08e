"""K-step generation: the most confident genes first, and one step is one forward pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cells import made_up_cells
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import N_BINS, N_GENES, PAD, random_pack
from runs import tiny_recipe, write_shards
from torch import Tensor, nn

import scfm
from scfm.data.batch import PackedBatch
from scfm.errors import ScfmError
from scfm.generation import Generated, generate
from scfm.model import ScGPT
from scfm.model.heads import HeadSpec
from scfm.recipe import ModelConfig
from scfm.training.run import pretrain

SURE = {"bins": HeadSpec("gep", "gep", N_BINS), "nonzero": HeadSpec("gep", "gep", nonzero=True)}


def model_with(head: HeadSpec, attention: str = "generative", **options: Any) -> ScGPT:
    torch.manual_seed(0)
    config = ModelConfig(width=16, heads=2, layers=2, hidden=16, attention=attention, **options)  # type: ignore[arg-type]
    return ScGPT(config, N_GENES + 2, PAD, N_BINS, {}, {}, [head]).double().eval()


class Oracle(nn.Module):
    """Predicts bins with a prescribed confidence per gene, and writes down what it was shown."""

    specs = {"gep": SURE["bins"]}

    def __init__(self, confidence: dict[int, float]) -> None:
        super().__init__()
        self.confidence, self.shown = confidence, []

    def forward(self, batch: PackedBatch, cell_prompt: Tensor | None = None) -> Any:
        known = ~batch.unknown_mask
        self.shown.append(dict(zip(batch.genes[known].tolist(), batch.values[known].tolist(), strict=True)))
        logits = torch.full((len(batch.predicted), N_BINS), -9.0)
        for row, gene in enumerate(batch.genes[batch.predicted].tolist()):
            logits[row] = ((1 - self.confidence[gene]) / (N_BINS - 1)) if self.confidence[gene] < 1 else 1e-9
            logits[row, gene % N_BINS] = self.confidence[gene]
        return SimpleNamespace(predictions={"gep": logits.log()})


def test_the_most_confident_genes_become_known_first() -> None:
    """Seven unknown genes in three steps: 3 + 2 + 2, each batch of them shown to the next step with its value."""
    batch = random_pack([9], [2])
    unknown = batch.genes[batch.predicted].tolist()
    confidence = dict(zip(unknown, (0.9, 0.3, 0.8, 0.2, 0.7, 0.95, 0.4), strict=True))
    oracle = Oracle(confidence)
    answer = generate(oracle, batch, steps=3)
    assert answer.step.tolist() == [1, 3, 1, 3, 2, 1, 2]
    assert answer.values.tolist() == [gene % N_BINS for gene in unknown]
    assert answer.confidence.tolist() == pytest.approx(list(confidence.values()))
    prompt = dict(zip(batch.genes[:2].tolist(), batch.values[:2].tolist(), strict=True))
    for step, shown in enumerate(oracle.shown):
        learned = {
            gene: float(gene % N_BINS) for gene, at in zip(unknown, answer.step.tolist(), strict=True) if at <= step
        }
        assert shown == prompt | learned


def test_equal_confidence_is_decided_by_gene_id() -> None:
    class Undecided(Oracle):
        def forward(self, batch: PackedBatch, cell_prompt: Tensor | None = None) -> Any:
            return SimpleNamespace(predictions={"gep": torch.zeros(len(batch.predicted), N_BINS)})

    batch = random_pack([6], [2])
    unknown = batch.genes[batch.predicted].tolist()
    answer = generate(Undecided({}), batch, steps=4)
    assert [gene for _, gene in sorted(zip(answer.step.tolist(), unknown, strict=True))] == sorted(unknown)


@pytest.mark.parametrize("kind", SURE)
@pytest.mark.parametrize("attention", ["generative", "full"])
@pytest.mark.parametrize("prompted", [False, True])
def test_one_step_is_one_forward_pass_exactly(kind: str, attention: str, prompted: bool) -> None:
    model, batch = model_with(SURE[kind], attention), random_pack([9, 1, 6], [3, 1, 1])
    cell_prompt = torch.randn(3, 16, dtype=torch.float64) if prompted else None
    with torch.inference_mode():
        predictions = model(batch, cell_prompt=cell_prompt).predictions
    answer = generate(model, batch, 1, cell_prompt)
    assert torch.equal(answer.raw, predictions["gep"])
    assert (answer.step == 1).all()
    if kind == "bins":
        assert torch.equal(answer.values, predictions["gep"].argmax(-1).double())
        assert torch.equal(answer.confidence, predictions["gep"].softmax(-1).amax(-1))
    else:
        expressed = predictions["gep_nonzero"].sigmoid()
        assert torch.equal(answer.values, torch.where(expressed >= 0.5, predictions["gep"], 0.0))
        assert torch.equal(answer.confidence, (expressed - 0.5).abs() * 2)


def test_values_of_a_binned_model_are_bins() -> None:
    batch = random_pack([30], [3])
    values = generate(model_with(SURE["nonzero"]), batch, 3, n_bins=N_BINS).values
    assert torch.equal(values, values.round())
    assert values.min() >= 0
    assert values.max() < N_BINS


@st.composite
def packs(draw: st.DrawFn) -> PackedBatch:
    lengths = draw(st.lists(st.integers(1, 14), min_size=1, max_size=4))
    return random_pack(lengths, [draw(st.integers(1, length)) for length in lengths], seed=draw(st.integers(0, 99)))


def close(ours: Generated, theirs: Generated, at: Any = slice(None)) -> None:
    assert ours.step.tolist() == theirs.step[at].tolist()
    assert ours.values.tolist() == theirs.values[at].tolist()
    torch.testing.assert_close(ours.raw, theirs.raw[at], rtol=1e-9, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(packs(), st.integers(1, 20), st.sampled_from(["generative", "full"]))
def test_growth_is_exact_and_batch_mates_change_nothing(batch: PackedBatch, steps: int, attention: str) -> None:
    model = model_with(SURE["bins"], attention)
    together = generate(model, batch, steps)
    cells = batch.cell_of_token[batch.predicted]
    for cell in range(batch.n_cells):
        at = (cells == cell).nonzero()[:, 0]
        for step in range(1, steps + 1):
            assert (together.step[at] <= step).sum() == -(-len(at) * step // steps)
        start, stop = batch.cu_seqlens[cell : cell + 2].tolist()
        alone = replace(
            batch,
            genes=batch.genes[start:stop],
            values=batch.values[start:stop],
            targets=batch.targets[start:stop],
            cu_seqlens=torch.tensor([0, stop - start], dtype=torch.int32),
            n_known=batch.n_known[cell : cell + 1],
            cell_id=batch.cell_id[cell : cell + 1],
        )
        close(generate(model, alone, steps), together, at)


@settings(max_examples=20, deadline=None)
@given(packs(), st.integers(1, 8), st.randoms(use_true_random=False))
def test_the_order_of_genes_changes_nothing(batch: PackedBatch, steps: int, random: Any) -> None:
    model = model_with(SURE["nonzero"])
    order = []
    bounds = batch.cu_seqlens.tolist()
    for start, stop, known in zip(bounds, bounds[1:], batch.n_known.tolist(), strict=False):
        seen, hidden = list(range(start + 1, start + known)), list(range(start + known, stop))
        random.shuffle(seen)
        random.shuffle(hidden)
        order += [start, *seen, *hidden]
    shuffled = replace(batch, genes=batch.genes[order], values=batch.values[order], targets=batch.targets[order])
    place = {position: u for u, position in enumerate(batch.predicted.tolist())}
    at = torch.tensor([place[order[position]] for position in shuffled.predicted.tolist()], dtype=torch.long)
    ours, theirs = generate(model, shuffled, steps, n_bins=N_BINS), generate(model, batch, steps, n_bins=N_BINS)
    close(ours, theirs, at)


def test_gene_conditions_stay_with_their_genes() -> None:
    batch = random_pack([9, 7], [2, 3])
    batch.gene_conditions = {"pathway": batch.genes.long() % 3}
    seen: list[bool] = []

    class Watching(Oracle):
        def forward(self, now: PackedBatch, cell_prompt: Tensor | None = None) -> Any:
            seen.append(torch.equal(now.gene_conditions["pathway"], now.genes.long() % 3))
            return super().forward(now)

    generate(Watching({gene: gene / 99 + 0.1 for gene in range(N_GENES)}), batch, steps=4)
    assert seen == [True] * 4


def test_what_cannot_be_generated_says_why() -> None:
    batch = random_pack([5], [2])
    with pytest.raises(ScfmError, match=r"not how sure it is.*cross_entropy"):
        generate(model_with(HeadSpec("gep", "gep")), batch, 2)
    with pytest.raises(ScfmError, match="no `gep` head"):
        generate(model_with(HeadSpec("annotation", "cls", 2)), batch, 2)
    with pytest.raises(ScfmError, match="steps: 0 must be at least 1"):
        generate(model_with(SURE["bins"]), batch, 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> scfm.PretrainedModel:
    """A tiny model that has learned which genes go together, zeros included, four bins by cross entropy."""
    place = tmp_path_factory.mktemp("generation")
    recipe = tiny_recipe(
        write_shards(place / "shards", n=240),
        place / "run",
        data={"genes": "all", "max_genes": 60, "tokens_per_pack": 2000, "n_bins": 4, "mask_ratios": [0.5]}
        | {"cells_per_batch": 32},
        trainer={"max_steps": 200},
        model={"layers": 2, "dropout": 0.0},
        optimizer={"lr": 5e-3},
    )
    recipe.objectives = [replace(objective, loss="cross_entropy") for objective in recipe.objectives]
    return scfm.load(pretrain(recipe))


def bins_of(cells: np.ndarray) -> np.ndarray:
    """Dense counts to the four bins of the model."""
    bins = np.zeros(cells.shape, int)
    for row, counts in zip(bins, cells, strict=True):
        edges = np.quantile(counts[counts > 0], np.linspace(0, 1, 3))
        row[counts > 0] = np.searchsorted(edges, counts[counts > 0], side="right")
    return bins


@pytest.mark.parametrize("steps", [1, 5])
def test_hidden_genes_are_told_from_the_known_ones(model: scfm.PretrainedModel, steps: int) -> None:
    """Genes of a type are high together; .58 of the bins are right where the commonest bin would be in .38."""
    cells = made_up_cells(60, seed=3)
    hidden = list(cells.var_names[30:])
    generated = model.generate(cells, hidden, steps=steps)
    truth = bins_of(cells.X.toarray())[:, 30:]
    assert (truth == generated.X).mean() > 0.1 + max((truth == constant).mean() for constant in range(4))
    assert np.corrcoef(generated.X.ravel(), truth.ravel())[0, 1] > 0.4


@pytest.mark.parametrize("start", ["genes", "cell"])
def test_generated_cells_are_an_anndata(model: scfm.PretrainedModel, start: str) -> None:
    cells = made_up_cells(6, seed=3)
    hidden = ["G031", "G002", "G047"]
    before = cells.X.copy()
    generated = model.generate(cells, hidden, steps=3, start=start)  # type: ignore[arg-type]
    assert generated.var_names.tolist() == hidden
    assert np.sort(generated.layers["step"], axis=1).tolist() == [[1, 2, 3]] * 6
    assert ((generated.layers["confidence"] > 0) & (generated.layers["confidence"] <= 1)).all()
    assert generated.obs["cell_type"].tolist() == cells.obs["cell_type"].tolist()
    assert (generated.uns["scfm"]["start"], generated.uns["scfm"]["steps"]) == (start, 3)
    assert (before != cells.X).nnz == 0


def test_a_cell_prompt_is_the_cell_embedding_alone(model: scfm.PretrainedModel) -> None:
    """Its genes are not known: what is generated is what the embedding in the place of `<cls>` says."""
    cells = made_up_cells(1, seed=3)
    store, conditions = model.store(cells), model.conditions_of(cells)
    (pack,) = model.packs(store, conditions, tokens_per_pack=100)
    genes = torch.arange(60)
    with torch.inference_mode():
        prompt = model.network(pack).cell
        asked = replace(
            pack,
            genes=torch.cat([pack.genes[:1], genes.int()]),
            values=torch.cat([pack.values[:1], torch.full((60,), -1.0)]),
            cu_seqlens=torch.tensor([0, 61], dtype=torch.int32),
            n_known=torch.ones(1, dtype=torch.int32),
        )
        expected = model.network(asked, cell_prompt=prompt).predictions["gep"].argmax(-1)
    names = [model.files.vocabulary.names[i] for i in range(60)]
    assert model.generate(cells, names, steps=1, start="cell").X[0].tolist() == expected.tolist()


def test_cells_are_generated_alike_in_any_chunk(model: scfm.PretrainedModel) -> None:
    cells = made_up_cells(20, seed=4)
    whole = model.generate(cells, list(cells.var_names[:9]), steps=3)
    chunked = model.generate(cells[::-1].copy(), list(cells.var_names[:9]), steps=3, tokens_per_pack=80)
    assert (whole.layers["step"] == chunked.layers["step"][::-1]).mean() > 0.99  # float32: a tie may fall otherwise
    np.testing.assert_allclose(whole.layers["confidence"], chunked.layers["confidence"][::-1], atol=1e-4)


def test_all_genes_of_the_prompt_unless_named_and_unknown_names_are_refused(model: scfm.PretrainedModel) -> None:
    cells = made_up_cells(4, seed=4)
    everything = model.generate(cells, steps=2, start="cell")
    assert sorted(everything.var_names) == sorted(cells.var_names)
    with pytest.raises(ScfmError, match=r"not in the model's vocabulary: \['MISSING'\]"):
        model.generate(cells, ["G001", "MISSING"], steps=1)
    with pytest.raises(ScfmError, match="neither `genes` nor `cell`"):
        model.generate(cells, steps=1, start="embedding")  # type: ignore[arg-type]
    with pytest.raises(ScfmError, match="stands there twice"):
        model.generate(cells, ["G001", "G001"], steps=1)


def test_a_pretrained_model_with_squared_error_is_refused(tmp_path: Path) -> None:
    plain = scfm.load(pretrain(tiny_recipe(write_shards(tmp_path / "shards"), tmp_path / "run")))
    with pytest.raises(ScfmError, match="squared error"):
        plain.generate(made_up_cells(2), steps=2)
