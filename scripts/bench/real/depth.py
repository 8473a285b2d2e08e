"""Is depth taken for a type? Annotation models on held-out cells of other depths, and cells of many depths to train on.

python scripts/bench/real/depth.py REFERENCE.h5ad QUERY.h5ad --splits splits.json --models SEED0/model SEED1/model ...
python scripts/bench/real/depth.py REFERENCE.h5ad QUERY.h5ad --splits splits.json --start MODEL --epochs 3

The first: models that `runs.sh annotation` fine-tuned, one per split, beside L1 logistic regression on their genes, on
held-out cells of the reference, one, two and four of a type added up, and on the query, whole and thinned. The second:
the model fine-tuned on the training cells of every split and once more on copies of them at other depths.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, diags
from sklearn.metrics import f1_score

from scfm.baselines import SparseLogisticRegression
from scfm.evaluation.asked import frozen_splits, read_cells
from scfm.pretrained import PretrainedModel, load
from scfm.recipe_reader import read_yaml

LABEL, FILE = "cell_type", "file"
MOST, FEWEST_KEPT, MOST_OF_A_TYPE = 4, 0.25, 100


def thinned(counts: csr_matrix, kept: NDArray[np.float64], rng: np.random.Generator) -> csr_matrix:
    """Return counts (n, g) of which each cell keeps a share, (n,), drawn count by count."""
    few = counts.copy()
    few.data = rng.binomial(np.round(few.data).astype(np.int64), np.repeat(kept, np.diff(few.indptr))).astype(
        np.float32
    )
    few.eliminate_zeros()
    return few


def summed(
    counts: csr_matrix, types: NDArray[np.str_], times: NDArray[np.int64], rng: np.random.Generator
) -> csr_matrix:
    """Return counts (n, g), to each cell added those of others of its type, until there are `times` (n,) of them."""
    total = counts.copy()
    for others in range(1, int(times.max())):
        mate = np.arange(len(types))
        for name in np.unique(types):
            of_type = np.flatnonzero(types == name)
            mate[of_type] = rng.permutation(of_type)
        total = total + diags((times > others).astype(np.float32)) @ counts[mate]
    return csr_matrix(total)


def at_other_depths(cells: anndata.AnnData, seed: int) -> anndata.AnnData:
    """Return cells and a copy of each, of one to four cells of its type, a quarter to all of their counts kept."""
    rng = np.random.default_rng(seed)
    types = cells.obs[LABEL].to_numpy(dtype=str)
    many = summed(csr_matrix(cells.X), types, rng.integers(1, MOST + 1, len(types)), rng)
    copies = cells.copy()
    copies.X = thinned(many, rng.uniform(FEWEST_KEPT, 1, len(types)), rng)
    copies.obs_names = [f"{name}-copy" for name in cells.obs_names]
    return anndata.concat([cells, copies], merge="same", uns_merge="first")


def predicted(model: PretrainedModel, cells: anndata.AnnData) -> NDArray[np.str_]:
    return model.predict(cells.copy()).obs["annotation"].to_numpy(dtype=str)


def said(found: NDArray[np.str_], true: NDArray[np.str_]) -> str:
    """Return accuracy, macro-F1 over the types that are there, and where each type's errors go most often."""
    macro = f1_score(true, found, average="macro", labels=np.unique(true), zero_division=0)
    errors = []
    for name in np.unique(true):
        wrong = found[(true == name) & (found != name)]
        if len(wrong):
            names, counts = np.unique(wrong, return_counts=True)
            errors.append(f"{name} as {names[counts.argmax()]} {counts.max() / np.sum(true == name):.2f}")
    return f"accuracy {np.mean(found == true):.3f}, macro f1 {macro:.3f}; {'; '.join(errors)}"


def other_depths(
    cells: anndata.AnnData, split_seed: int, train: NDArray, test: NDArray
) -> Sequence[tuple[str, anndata.AnnData]]:
    """Return held-out cells of the reference and the query, named, each at three depths."""
    rng = np.random.default_rng(split_seed)
    types, counts = cells.obs[LABEL].to_numpy(dtype=str), csr_matrix(cells.X)
    rest = np.setdiff1d(np.flatnonzero(cells.obs[FILE] == cells.obs[FILE].iloc[train[0]]), train)
    few = np.sort(
        np.concatenate([rng.permutation(rest[types[rest] == t])[:MOST_OF_A_TYPE] for t in np.unique(types[rest])])
    )
    result = []
    for times in (1, 2, MOST):
        one = cells[few].copy()
        one.X = summed(counts[few], types[few], np.full(len(few), times), rng)
        result.append((f"reference x {times}", one))
    for kept in (1.0, 0.6, 0.4):
        one = cells[test].copy()
        one.X = thinned(counts[test], np.full(len(test), kept), rng)
        result.append((f"query, {kept:.0%} of its counts", one))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference")
    parser.add_argument("query")
    parser.add_argument("--splits", required=True)
    parser.add_argument("--models", nargs="+", default=[])
    parser.add_argument("--start")
    parser.add_argument("--epochs", type=int, default=3)
    given = parser.parse_args()
    cells = read_cells([given.reference, given.query], LABEL)
    splits = frozen_splits(given.splits, cells)
    for split, source in zip(splits, given.models, strict=False):
        model = load(source)
        shared = cells.var_names.isin([entry.symbol for entry in model.files.vocabulary.entries])
        linear = SparseLogisticRegression().fit(cells[split.train][:, shared].copy(), LABEL, split.seed)
        for name, asked in other_depths(cells, split.seed, split.train, split.test):
            true = asked.obs[LABEL].to_numpy(dtype=str)
            print(f"seed {split.seed}, {name}: model {said(predicted(model, asked), true)}")
            print(
                f"seed {split.seed}, {name}: L1    {said(linear.predict(asked[:, shared].copy())[0], true)}", flush=True
            )
    for split in splits if given.start else []:
        sections = read_yaml(Path(__file__).with_name("annotation.yaml"))
        task = {"name": "annotation", "label": LABEL, **sections.pop("task")}
        trainer = {**sections.pop("trainer"), "max_epochs": given.epochs}
        train = at_other_depths(cells[split.train].copy(), 100 + split.seed)
        tuned = load(given.start).finetune(train, task, **sections, trainer=trainer, seed=split.seed)
        held_out = cells[split.test]
        print(
            f"seed {split.seed}: {said(predicted(tuned, held_out), held_out.obs[LABEL].to_numpy(dtype=str))}",
            flush=True,
        )


if __name__ == "__main__":
    main()
