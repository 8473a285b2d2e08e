"""From counts to tokens beside the original: exact where it is deterministic, by what both keep where it draws."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
import scanpy as sc
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scgpt_cases import OTHERWISE, VOCABULARY
from scipy.sparse import csr_matrix

from scfm.data.binning import edges_of_reals
from scfm.data.order import CellOrder
from scfm.data.sources import store_from_anndata
from scfm.data.tokens import TokenConfig, Tokeniser

pytestmark = pytest.mark.golden

PAD, CLS = VOCABULARY.pad, VOCABULARY.cls
Cells = list[tuple[NDArray[np.int64], NDArray[np.float64]]]  # per cell: ids of its genes, their values


def case(shared: Path, name: str, how: str) -> tuple[dict[str, NDArray], dict[str, NDArray]]:
    """Return inputs and outputs of a case; `how` is what the parity table says of it."""
    OTHERWISE[name] = how
    folder = shared / "golden/scgpt" / name
    return load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")


def tokens_of(cells: Cells, epoch: int = 0, **settings: object) -> list[tuple[NDArray, NDArray, NDArray, int]]:
    """Tokenise cells; per cell: genes, values, true values, and how many of its genes are unknown."""
    dense = np.zeros((len(cells), VOCABULARY.n_genes))
    for row, (genes, values) in zip(dense, cells, strict=True):
        row[genes] = values
    adata = anndata.AnnData(csr_matrix(dense))
    adata.var_names = VOCABULARY.names[: VOCABULARY.n_genes]
    store = store_from_anndata(adata, VOCABULARY, accept_normalised=True)
    tokeniser = Tokeniser(TokenConfig(**({"mask_ratios": (0.0,)} | settings)), VOCABULARY, store.value_kind)  # type: ignore[arg-type]
    rows = np.arange(len(cells))
    lengths, n_unknown = tokeniser.plan(store, rows, rows.astype(np.uint64), epoch)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    genes, values, targets = (np.empty(lengths.sum(), kind) for kind in (np.int32, np.float32, np.float32))
    tokeniser.fill(store, rows, rows.astype(np.uint64), epoch, starts, lengths, n_unknown, genes, values, targets)
    ends = np.cumsum(lengths)[:-1]
    split = (np.split(array, ends) for array in (genes, values, targets))
    return list(zip(*split, n_unknown.tolist(), strict=True))


def by_gene(genes: NDArray, values: NDArray) -> dict[int, float]:
    """Return gene -> value without padding; no gene may stand there twice."""
    real = genes != PAD
    assert len(set(genes[real].tolist())) == real.sum()
    return dict(zip(genes[real].tolist(), values[real].tolist(), strict=True))


def rows_of(inputs: dict[str, NDArray]) -> Cells:
    data, ids = inputs["data"], inputs["gene_ids"]
    return [(ids[row > 0], row[row > 0]) for row in data]


def test_tokenizer(shared: Path) -> None:
    """tokenize_and_pad_batch: `<cls>` with value 0, then the non-zero genes, or all; ours have no padding."""
    inputs, outputs = case(shared, "tokenizer", "exact; sampling and masking by invariants")
    cells = rows_of(inputs)

    def theirs(name: str, row: int) -> dict[int, float]:
        return by_gene(outputs[f"{name}_genes"][row], outputs[f"{name}_values"][row])

    for row, (genes, values, _, _) in enumerate(tokens_of(cells, values="raw", cls_value=0.0)):
        assert (genes[0], values[0]) == (CLS, 0.0)
        ours = by_gene(genes, values)
        assert ours == theirs("nonzero", row)
        assert {gene: value for gene, value in ours.items() if gene != CLS} == theirs("nocls", row)
    every = tokens_of(cells, values="raw", cls_value=0.0, genes="all")
    for row, (genes, values, _, _) in enumerate(every):
        ours = by_gene(genes, values)
        assert {gene: ours[gene] for gene in [CLS, *inputs["gene_ids"].tolist()]} == theirs("allgenes", row)
    # sampled down to 10: `<cls>` stays, the rest is a part of the cell without repetition
    for row, (genes, values, _, _) in enumerate(tokens_of(cells, values="raw", cls_value=0.0, max_genes=9)):
        for part in (by_gene(genes, values), theirs("sampled_seed7", row)):
            assert part[CLS] == 0.0
            assert len(part) == min(10, len(cells[row][0]) + 1)
            assert part.items() <= theirs("nonzero", row).items()
    # masked: the original hides int(n * ratio) of all tokens, `<cls>` among the candidates; ours never hides `<cls>`
    for read, name, draw in (("expressed", "nonzero", 8), ("all", "allgenes", 9)):
        masked = tokens_of(cells, values="raw", cls_value=0.0, genes=read, mask_ratios=(0.4,))
        for row, (genes, values, truth, unknown) in enumerate(masked):
            hidden = values == -1
            assert hidden.sum() == unknown == int((len(genes) - 1) * 0.4)
            assert hidden[len(genes) - unknown :].all()
            assert by_gene(genes, truth).items() >= theirs(name, row).items()
            assert (values == truth)[~hidden].all()
            stored, plain = outputs[f"masked_seed{draw}_of_{name}_values"][row], outputs[f"{name}_values"][row]
            n_real = (outputs[f"{name}_genes"][row] != PAD).sum()
            assert (stored == -1).sum() == int(n_real * 0.4)
            assert (stored == plain)[stored != -1].all()
    assert (outputs["masked_seed9_of_allgenes_values"][:, 0] == -1).any()  # a hidden `<cls>`


def collated(inputs: dict[str, NDArray]) -> Cells:
    return [(inputs[f"genes_{i}"][1:], inputs[f"expressions_{i}"][1:]) for i in range(4)]


def test_collators(shared: Path) -> None:
    """DataCollator: bins of the whole cell; known and unknown genes are disjoint parts of it, `<cls>` known.

    Differs on purpose: ours draws a mask ratio per cell (theirs per batch), samples a long cell down before splitting
    it (theirs after), hides an exact share where theirs tosses a coin per gene (`mlm`), and pads nothing.
    """
    inputs, outputs = case(shared, "collators", "exact; sampling and masking by invariants")
    cells = collated(inputs)
    bins = [by_gene(g, v) for g, v in zip(outputs["main_nomask_gene"], outputs["main_nomask_expr"], strict=True)]
    np.testing.assert_array_equal(outputs["main_nomask_masked_expr"], outputs["main_nomask_expr"])
    for row, (genes, values, _, _) in enumerate(tokens_of(cells)):
        assert by_gene(genes, values) == bins[row]
        assert min(values[1:]) > 0
    for ratio in (0.25, 0.5, 0.75):
        for longest in (100, 16):
            name = f"both_p{ratio}_len{longest}_seed4"
            ours = tokens_of(cells, max_genes=longest - 1, mask_ratios=(ratio,))
            for row, (genes, values, truth, unknown) in enumerate(ours):
                known = len(genes) - unknown
                sides = [
                    (by_gene(genes[:known], values[:known]), by_gene(genes[known:], truth[known:])),
                    (
                        by_gene(outputs[f"{name}_pcpt_gene"][row], outputs[f"{name}_pcpt_expr"][row]),
                        by_gene(outputs[f"{name}_gen_gene"][row], outputs[f"{name}_gen_expr_target"][row]),
                    ),
                ]
                for seen, asked in sides:
                    assert seen.keys().isdisjoint(asked)
                    assert seen[CLS] == -2
                    assert (seen | asked).items() <= bins[row].items()
                    kept = min(len(bins[row]), longest) - 1
                    assert len(asked) == int(kept * ratio)
                    assert len(seen) == 1 + kept - len(asked)
                assert (values[known:] == -1).all()
    stored = outputs["main_mlm_len16_seed3_masked_expr"]
    for row, (genes, values, _, unknown) in enumerate(tokens_of(cells, max_genes=15, mask_ratios=(0.4,))):
        assert len(genes) == stored.shape[1] == 16
        assert (values == -1).sum() == unknown == 6
        shown = {gene: value for gene, value in by_gene(genes, values).items() if value != -1}
        theirs = by_gene(outputs["main_mlm_len16_seed3_gene"][row], stored[row])
        for part in (shown, {gene: value for gene, value in theirs.items() if value != -1}):
            assert part[CLS] == -2
            assert part.items() <= bins[row].items()


def test_preprocessor(shared: Path) -> None:
    """Filter, normalise and log by scanpy, then our bins: `scfm prepare --accept-normalised` on the same steps."""
    inputs, outputs = case(shared, "preprocessor", "exact")
    adata = anndata.AnnData(inputs["X"].copy())
    kept, _ = sc.pp.filter_genes(adata, min_counts=3, inplace=False)
    assert np.flatnonzero(kept).tolist() == outputs["kept_genes"].tolist()
    adata = adata[:, kept].copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    # numpy's float32 logarithm differs in the last bit between processors with AVX-512 and without; bins are of theirs
    np.testing.assert_array_max_ulp(adata.X, outputs["X_log1p"], maxulp=1)
    logged = outputs["X_log1p"]
    np.testing.assert_array_equal(outputs["X_normed"], logged)  # theirs is logged in place
    genes = np.arange(adata.n_vars)
    for row, (ids, bins, _, _) in enumerate(tokens_of([(genes[x > 0], x[x > 0]) for x in logged])):
        dense = np.zeros(len(genes), np.int64)
        dense[ids[1:]] = bins[1:]
        assert dense.tolist() == outputs["X_binned"][row].tolist()
    quantiles, edges = np.linspace(0, 1, 50), np.empty(50)
    for row, x in enumerate(logged):
        edges_of_reals(np.sort(x[x > 0]), quantiles, edges)
        assert [0, *edges] == outputs["bin_edges"][row].tolist()


@pytest.mark.parametrize("n_bins", [6, 11, 51])
def test_digitize_ties_edges(shared: Path, n_bins: int) -> None:
    """The edges themselves, and the lowest and highest digit that a tie may take."""
    inputs, outputs = case(shared, "digitize_ties", "exact; random ties by their range")
    counts = inputs["counts"][inputs["counts"] > 0]
    edges = np.empty(n_bins - 1)
    edges_of_reals(np.sort(counts), np.linspace(0, 1, n_bins - 1), edges)
    assert edges.tolist() == outputs[f"edges_bins{n_bins}"].tolist()
    # the original's names: "left" counts the edges at or below a value, which is our bin; "right" those below it
    assert np.searchsorted(edges, counts, side="right").tolist() == outputs[f"left_bins{n_bins}"].tolist()
    assert np.searchsorted(edges, counts, side="left").tolist() == outputs[f"right_bins{n_bins}"].tolist()


def test_subsets_batch_sampler(shared: Path) -> None:
    """SubsetsBatchSampler makes batches of one domain and fails in its second epoch.

    DSBN norms every cell by its own domain here, so batches may be mixed. Read in order, every cell comes once;
    shuffled, none comes twice, and those that do not fill a last batch wait for another of any number of epochs.
    """
    import json

    OTHERWISE["subsets_batch_sampler"] = "by invariants"
    stored = json.loads((shared / "golden/scgpt/subsets_batch_sampler/config.json").read_text())
    assert stored["second_epoch"].startswith("RuntimeError")
    everyone = sorted(row for subset in stored["subsets"] for row in subset)
    for name in ("sequential", "shuffled_seed0"):
        assert sorted(row for batch in stored[name] for row in batch) == everyone

    def read(order: CellOrder, epoch: int) -> list[int]:
        return [row for k in range(len(order)) for row in order.batch(epoch, k).tolist()]

    size = stored["batch_size"]
    assert read(CellOrder(range(len(everyone)), size, seed=0, shuffle=False), 0) == everyone
    epochs = [read(CellOrder(range(len(everyone)), size, seed=0), epoch) for epoch in range(20)]
    for rows in epochs:
        assert len(set(rows)) == len(rows) == len(everyone) // size * size
    assert epochs[0] != epochs[1]
    assert {row for rows in epochs for row in rows} == set(everyone)
