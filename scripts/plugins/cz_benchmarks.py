"""Score an embedding that `scfm embed` wrote with the tasks of cz-benchmarks, beside their PCA of the same cells.

    czb/bin/python scripts/plugins/cz_benchmarks.py embedded.h5ad --label cell_type --batch donor_id --out czb.json

Runs in an environment of its own, which has cz-benchmarks and not scfm: the two meet in the h5ad file. cz-benchmarks
has no class for models; a task takes the matrix of cells, in the order of the labels.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
from czbenchmarks.tasks.clustering import ClusteringTask, ClusteringTaskInput
from czbenchmarks.tasks.embedding import EmbeddingTask, EmbeddingTaskInput
from czbenchmarks.tasks.integration import BatchIntegrationTask, BatchIntegrationTaskInput
from czbenchmarks.tasks.label_prediction import MetadataLabelPredictionTask, MetadataLabelPredictionTaskInput
from scipy.sparse import issparse

if TYPE_CHECKING:
    import pandas as pd

SEED = 42  # that of the published results
BASELINE = "PCA baseline"


def scores(representation: np.ndarray, obs: pd.DataFrame, label: str, batch: str | None) -> dict[str, list[dict]]:
    """Return task -> its metrics (metric, value, params) for the cells' representation (n, d).

    Args:
        representation: rows as in `obs`.
        obs: labels of the cells.
        label: column of the cell types.
        batch: column of the batches; without it there is no batch integration.
    """
    labels = obs[label].astype(str)
    tasks: dict[str, tuple[Any, Any]] = {
        "clustering": (ClusteringTask, ClusteringTaskInput(obs=obs, input_labels=labels)),
        "embedding": (EmbeddingTask, EmbeddingTaskInput(input_labels=labels)),
        "label_prediction": (MetadataLabelPredictionTask, MetadataLabelPredictionTaskInput(labels=labels)),
    }
    if batch is not None:  # as text: a batch of numbers would be taken for a quantity
        batches = BatchIntegrationTaskInput(batch_labels=obs[batch].astype(str), labels=labels)
        tasks["integration"] = (BatchIntegrationTask, batches)
    found = {}
    for name, (task, given) in tasks.items():
        results = task(random_seed=SEED).run(representation, task_input=given)
        found[name] = [
            {"metric": one.metric_type.value, "value": float(one.value), "params": one.params or {}} for one in results
        ]
    return found


def baseline(adata: anndata.AnnData) -> np.ndarray:
    """Return cz-benchmarks' own baseline of raw counts: normalised, log1p, 3,000 variable genes, 50 components."""
    counts = adata.X if adata.raw is None else adata.raw.X
    values = counts.data if issparse(counts) else counts
    if not np.array_equal(values, np.rint(values)):
        sys.exit("the baseline needs raw counts in raw.X or X, and there are other values")
    return np.asarray(ClusteringTask(random_seed=SEED).compute_baseline(counts))


def table(found: dict[str, dict[str, list[dict]]]) -> str:
    """Return a line per metric, a column per representation; of label prediction the mean over the classifiers."""
    names = list(found)
    lines = [f"{'':<42}" + "".join(f"{name:>16}" for name in names)]
    for task, metrics in found[names[0]].items():
        for at, one in enumerate(metrics):
            if one["params"].get("classifier", "MEAN").startswith("MEAN"):
                values = [found[name][task][at]["value"] for name in names]
                lines.append(f"{task + ': ' + one['metric']:<42}" + "".join(f"{value:>16.3f}" for value in values))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Run the tasks on a file; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("file", type=Path, help="h5ad file that `scfm embed` wrote")
    parser.add_argument("--label", required=True, help="obs column of the cell types")
    parser.add_argument("--batch", help="obs column of the batches, for batch integration")
    parser.add_argument("--key", default="X_scfm", help="obsm key of the embedding")
    parser.add_argument("--out", type=Path, help="JSON file for all scores")
    options = parser.parse_args(arguments)
    adata = anndata.read_h5ad(options.file)
    if options.key not in adata.obsm:
        parser.error(f"{options.file}: has no obsm[{options.key!r}]; `scfm embed` writes it")
    missing = [name for name in (options.label, options.batch) if name is not None and name not in adata.obs]
    if missing:
        parser.error(f"{options.file}: obs has no column {missing[0]!r}; it has {', '.join(adata.obs.columns)}")
    representations = {options.key: np.asarray(adata.obsm[options.key]), BASELINE: baseline(adata)}
    found = {name: scores(cells, adata.obs, options.label, options.batch) for name, cells in representations.items()}
    say(table(found))
    if options.out is not None:
        result = {"version": version("cz-benchmarks"), "random_seed": SEED, "file": str(options.file), "scores": found}
        options.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
