"""Real cells for `runs.sh`: informative genes, samples, frozen splits, cells of one organism in the genes of another.

python scripts/bench/real/cells.py genes   --out vocab.json  --count 1000 FILE.h5ad ...
python scripts/bench/real/cells.py sample  --out OUT.h5ad    --most 4000 FILE.h5ad
python scripts/bench/real/cells.py splits  --out splits.json --most 1000 --seeds 5 REFERENCE.h5ad QUERY.h5ad
python scripts/bench/real/cells.py mapped  --out OUT.h5ad    --orthologs TABLE CELLS.h5ad CELLS_OF_THE_OTHER.h5ad
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
from numpy.typing import NDArray

from scfm.baselines.inputs import ExpressionRule
from scfm.data.genes import genes_of
from scfm.data.orthologs import Orthologs
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.evaluation.asked import read_cells
from scfm.evaluation.splits import Split, save_splits

LABEL, FILE = "cell_type", "file"
LEAST_MEAN = 0.3


def informative_genes(files: Sequence[str], count: int) -> Vocabulary:
    """Return the genes whose log expression varies most for its mean within files, both averaged over all cells.

    The mean counts as LEAST_MEAN at least: without, rare genes come first, of which a cell expresses few; by variance
    alone, ribosomal genes do, and the embedding tells types apart less well (the figures are in BENCHMARKS.md).
    """
    known: dict[str, Gene] = {}
    means: dict[str, float] = {}
    variances: dict[str, float] = {}
    total = 0
    for file in files:
        cells = anndata.read_h5ad(file)
        expression = ExpressionRule.learn(cells).apply(cells)
        mean = np.asarray(expression.mean(0)).ravel()
        spread = np.asarray(expression.multiply(expression).mean(0)).ravel() - mean**2
        for ensembl, symbol, average, variance in zip(*genes_of(cells.var), mean, spread, strict=True):
            if ensembl is not None and symbol is not None:
                known.setdefault(ensembl, Gene.of(ensembl, symbol))
                means[ensembl] = means.get(ensembl, 0.0) + average * cells.n_obs
                variances[ensembl] = variances.get(ensembl, 0.0) + variance * cells.n_obs
        total += cells.n_obs
    chosen = sorted(known, key=lambda gene: -variances[gene] / max(means[gene], LEAST_MEAN * total))[:count]
    print(f"{count:,} of {len(known):,} genes, by variance over mean of log expression in {total:,} cells")
    return Vocabulary.from_genes(known[gene] for gene in chosen)


def drawn(labels: NDArray[np.str_], most: int, seed: int) -> NDArray[np.int64]:
    """Return the rows of so many cells, types in their own shares, two cells of each at least where there are two."""
    if len(labels) <= most:
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    rows = []
    for name in np.unique(labels):
        of_type = rng.permutation(np.flatnonzero(labels == name))
        rows.append(of_type[: max(2, round(most * len(of_type) / len(labels)))])
    return np.sort(np.concatenate(rows))


def across(reference: str, query: str, most: int, seeds: int, out: Path) -> None:
    """Freeze a split for every seed: other training cells of the reference, the query's cells of its types held out."""
    cells = read_cells([reference, query], LABEL)
    labels = cells.obs[LABEL].to_numpy(dtype=str)
    is_query = (cells.obs[FILE] == Path(query).stem).to_numpy()
    known = np.isin(labels, np.unique(labels[~is_query]))
    test, lacking = np.flatnonzero(is_query & known), int((is_query & ~known).sum())
    rows = np.flatnonzero(~is_query)
    splits = []
    for seed in range(seeds):
        train = rows[drawn(labels[rows], most, seed)]
        said = (
            f"{len(train):,} cells of {Path(reference).stem}, drawn by the seed within types, judged on "
            f"{Path(query).stem}; {lacking:,} cells of types that the reference lacks left out"
        )
        splits.append(Split(train, test, seed, said))
    save_splits(out, splits, cells.obs_names.tolist())
    print(
        f"{out}: {seeds} splits, {len(splits[0].train):,} training cells, {len(test):,} held out; {splits[0].protocol}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["genes", "sample", "splits", "mapped"])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--most", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--orthologs")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if given.what == "genes":
        informative_genes(given.files, given.count).save(given.out)
    elif given.what == "splits":
        across(given.files[0], given.files[1], given.most, given.seeds, given.out)
    elif given.what == "sample":
        cells = read_cells(given.files, LABEL)
        cells[drawn(cells.obs[LABEL].to_numpy(dtype=str), given.most, seed=0)].write_h5ad(given.out)
    else:
        cells, other = (anndata.read_h5ad(file) for file in given.files)
        translated = Orthologs.read(given.orthologs).translate(cells, other)
        print(translated.uns["orthologs"])
        translated.write_h5ad(given.out)


if __name__ == "__main__":
    main()
