"""From counts to scBERT's tokens, its masks and its learning rates, beside the original."""

from __future__ import annotations

import json
from math import ceil
from pathlib import Path

import anndata
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy.sparse import csr_matrix

from scfm.data.sources import store_from_anndata
from scfm.data.store import CellStore
from scfm.data.tokens import TokenConfig, Tokeniser
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.recipe import OptimizerConfig
from scfm.training.optimizers import learning_rate_factor

pytestmark = pytest.mark.golden

SCBERT = TokenConfig(
    genes="all",
    max_genes=127,
    values="log2",
    n_bins=6,
    mask_ratios=(0.0,),
    mask_candidates="expressed",
    mask_kept=0.1,
    cls_value=0.0,
    mask_value=6.0,
)


def case(shared: Path, name: str) -> tuple[dict[str, object], dict[str, NDArray]]:
    """Return what a case says of itself, and its tensors."""
    folder = shared / "golden/scbert" / name
    return json.loads((folder / "case.json").read_text())["meta"], load_file(folder / "tensors.safetensors")


def store_of(matrix: NDArray, genes: list[str], vocabulary: Vocabulary) -> CellStore:
    adata = anndata.AnnData(csr_matrix(matrix))
    adata.var_names = genes
    return store_from_anndata(adata, vocabulary, accept_normalised=True)


def in_order(config: TokenConfig, store: CellStore, epoch: int = 0) -> tuple[NDArray, NDArray, NDArray]:
    """Return values, true values, (cells, genes + 1) in the original's order, `<cls>` last, and the unknown genes."""
    tokeniser = Tokeniser(config, store.vocabulary, store.value_kind)
    rows = np.arange(store.n_cells)
    keys = rows.astype(np.uint64)
    lengths, n_unknown = tokeniser.plan(store, rows, keys, epoch)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    genes, values, targets = (np.empty(lengths.sum(), kind) for kind in (np.int32, np.float32, np.float32))
    tokeniser.fill(store, rows, keys, epoch, starts, lengths, n_unknown, genes, values, targets)
    assert (lengths == store.vocabulary.n_genes + 1).all()
    shape = store.n_cells, store.vocabulary.n_genes + 1
    genes, values, targets = (array.reshape(shape) for array in (genes, values, targets))
    assert (genes[:, 0] == store.vocabulary.cls).all()
    assert (np.sort(genes[:, 1:]) == np.arange(store.vocabulary.n_genes)).all()
    order = np.argsort(np.where(genes == store.vocabulary.cls, store.vocabulary.n_genes, genes), axis=1)
    unknown = np.arange(shape[1]) >= (lengths - n_unknown)[:, None]
    return tuple(np.take_along_axis(array, order, 1) for array in (values, targets, unknown))  # type: ignore[return-value]


def test_counts_become_the_ids_of_the_original(shared: Path) -> None:
    """Aligned to the vocabulary first, then normalised by the total of its genes only; from either form of values."""
    meta, tensors = case(shared, "tokenise")
    reference: list[str] = meta["reference_genes"]  # type: ignore[assignment]
    vocabulary = Vocabulary.from_genes(Gene.of(None, name) for name in reference)
    counts = store_of(tensors["raw_counts"], meta["source_genes"], vocabulary)  # type: ignore[arg-type]
    logarithms = store_of(tensors["log2_norm"], reference, vocabulary)
    assert (counts.value_kind, logarithms.value_kind) == ("counts", "normalised")
    for store in (counts, logarithms):
        values, targets, unknown = in_order(SCBERT, store)
        assert values.tolist() == targets.tolist() == tensors["input_ids"].tolist()
        assert not unknown.any()
    # the cells of the case have about a hundred counts, so that all their genes are in the highest bin
    deep = in_order(TokenConfig(genes="all", values="log2", n_bins=51, mask_ratios=(0.0,), cls_value=0.0), counts)[0]
    assert deep[:, :-1].tolist() == np.floor(tensors["log2_norm"]).tolist()


def test_learning_rates_of_a_hundred_epochs(shared: Path) -> None:
    meta, tensors = case(shared, "lr_schedule")
    config = OptimizerConfig(lr=1e-4, warmup=5, schedule="cosine_restarts")
    factor = learning_rate_factor(config, total_steps=700, epoch_steps=7)
    rates = np.array([config.lr * factor(step) for step in range(700)]).reshape(100, 7)
    assert (rates == rates[:, :1]).all(), "the rate changes within an epoch"
    np.testing.assert_allclose(rates[:, 0], tensors["lr_per_epoch"], rtol=1e-14)
    assert [epoch for epoch in range(1, 100) if rates[epoch, 0] == config.min_lr] == meta["cycle_starts"]


def test_masks_keep_what_the_original_keeps(shared: Path) -> None:
    """Which genes are drawn cannot be equal: how many, of which, what stands there, and what is to be predicted is."""
    meta, tensors = case(shared, "mlm_masking")
    ids = tensors["ids"]
    vocabulary = Vocabulary.from_genes(Gene.of(None, f"G{i:03}") for i in range(127))
    store = store_of(ids[:, :-1].astype(np.float32) + 0.5 * (ids[:, :-1] > 0), vocabulary.names[:127], vocabulary)
    config = TokenConfig(**{**vars(SCBERT), "mask_ratios": (0.15,)})
    n_candidates = (ids > 0).sum(1)
    epochs, shown, hidden = 300, 0, np.zeros(ids.shape)
    for epoch in range(epochs):
        values, targets, unknown = in_order(config, store, epoch)
        assert targets.tolist() == ids.tolist()
        assert (unknown.sum(1) == [ceil(0.15 * n) for n in n_candidates]).all()
        assert not (unknown & (ids == 0)).any()
        assert (values == ids)[~unknown].all()
        assert np.isin(values[unknown], [6.0]).sum() + (values == ids)[unknown].sum() == unknown.sum()
        shown += (values == ids)[unknown].sum()
        hidden += unknown
    for draw, _ in enumerate(meta["seeds"]):  # type: ignore[arg-type]
        masked, labels = tensors[f"masked_input.{draw}"], tensors[f"labels.{draw}"]
        theirs = labels != 6
        assert (theirs.sum(1) == unknown.sum(1)).all()
        assert (labels == ids)[theirs].all()
        assert (masked == ids)[~theirs].all()
        assert set(masked[theirs & (masked != ids)].tolist()) == {6}
    # 10 % are shown, where the original replaced 0.8986 in its many draws
    total = unknown.sum() * epochs
    assert abs(shown / total - 0.1) < 4 * np.sqrt(0.09 / total)
    # every candidate of a cell is hidden equally often
    rate = (unknown.sum(1) / np.maximum(n_candidates, 1))[:, None]
    expected = np.broadcast_to(epochs * rate, ids.shape)[ids > 0]
    spread = np.sqrt(expected * (1 - expected / epochs))
    several = spread > 0  # a cell's only candidate is always hidden
    deviation = (hidden[ids > 0] - expected)[several] / spread[several]
    assert np.abs(deviation).max() < 4.5
    assert abs(np.square(deviation).mean() - 1) < 0.2
