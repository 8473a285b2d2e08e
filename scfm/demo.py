"""The main job on bundled real cells: shards, pretraining, annotation, and a report beside the baselines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from scfm.errors import ScfmError
from scfm.evaluation.methods import FineTuned

if TYPE_CHECKING:
    from anndata import AnnData

    from scfm.pretrained import PretrainedModel

LABEL = "bulk_labels"


class PretrainedOnTheSplit(FineTuned):
    """Prepares, pretrains and fine-tunes on the training cells of each split, so that no held-out cell is ever seen."""

    def describe(self) -> str:
        return "scGPT, pretrained on the training cells of each split, then fine-tuned on their labels"

    def pretrained(self, adata: AnnData, seed: int) -> PretrainedModel:
        from scfm.data.prepare import prepare
        from scfm.pretrained import load
        from scfm.recipe_reader import bundled, read_recipe
        from scfm.training.run import pretrain

        cells = self.runs / f"training-cells-seed{seed}.h5ad"
        shards = self.runs / f"shards-seed{seed}"
        adata.write_h5ad(cells)
        prepare([cells], shards, accept_normalised=True, seed=seed)
        out = self.runs / f"pretraining-seed{seed}"
        overrides = {"seed": seed, "out": str(out), "data": {"shards": str(shards)}}
        return load(pretrain(read_recipe(bundled("pretrain/quickstart.yaml"), overrides)))


def demo(out: str = "demo", *, seeds: int = 3) -> None:
    """Run everything that scfm does once, on the 700 peripheral blood cells that scanpy bundles, and write report.html.

    Args:
        out: Folder for runs and report; must not exist or be empty.
        seeds: Splits into training and held-out cells, each with its own pretraining.
    """
    import scanpy
    import torch

    from scfm.baselines.mean_value import baselines_of
    from scfm.data.hashing import store_hashes
    from scfm.data.sources import store_from_anndata
    from scfm.data.vocabulary import Gene, Vocabulary
    from scfm.evaluation.harness import compare
    from scfm.evaluation.report import print_report, write_report
    from scfm.evaluation.splits import stratified_split
    from scfm.evaluation.training_plots import TrainingLog
    from scfm.metrics_file import read_metrics
    from scfm.recipe_reader import bundled, read_yaml

    started = time.perf_counter()
    torch.set_num_threads(1)  # packs this small cost more to share between threads than to compute
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise ScfmError(f"{folder}: is not empty; choose another --out")
    runs = folder / "runs"
    runs.mkdir(parents=True)
    adata = scanpy.datasets.pbmc68k_reduced()
    labels = adata.obs[LABEL].to_numpy(dtype=str)
    vocabulary = Vocabulary.from_genes([Gene.of(None, name) for name in adata.raw.var_names])
    hashes = store_hashes(store_from_anndata(adata, vocabulary, accept_normalised=True))
    recipe = read_yaml(bundled("finetune/annotation-quickstart.yaml"))
    method = PretrainedOnTheSplit("scGPT (scfm)", runs, runs, recipe)
    splits = [stratified_split(labels, seed=seed) for seed in range(seeds)]
    comparison = compare([method], adata, LABEL, splits, cell_hashes=hashes)
    metrics = read_metrics(runs / "pretraining-seed0" / "metrics.csv")
    training = {"pretraining, first seed": TrainingLog(metrics, baselines_of(metrics))}
    page = write_report(comparison, folder, title="scfm demo: annotation of peripheral blood cells", training=training)
    print_report(comparison)
    print(f"{time.perf_counter() - started:.0f} seconds; open {page}")
