"""scBERT on real cells: masked bins, then annotation of another study's cells, beside what needs no pretraining.

    OMP_NUM_THREADS=1 taskset -c 1 python scripts/bench/scbert_annotation.py --data shared/data --work FOLDER

Pretraining: all cells of `pretrain/*.h5ad`. Fine-tuning: a few hundred cells of `annotation/pbmc_facs_zheng.h5ad`,
drawn anew for every seed, in the shares of their sorted populations. Test: the cells of `annotation/pbmc3k_10x.h5ad`
whose type the training cells have; of the others, and of these, it is told how many a threshold of 0.5 leaves
unassigned. Nothing reads the test cells before they are predicted, the choice of the genes included.

The seed draws the weights, the masks, the order of the cells and the training cells. Networks with and without
pretraining start fine-tuning from the same form, on the same cells, with the same recipe.

The network has the shape of recipes/pretrain/scbert-small.yaml. With --mixers the three mixers are pretrained instead,
on the first seed, and nothing is annotated.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import torch
from anndata import AnnData

import scfm
from scfm.baselines import BalancedLogisticRegression
from scfm.baselines.majority_bin import majority_bins_of
from scfm.checkpoints.native import load_model, save_model
from scfm.data.hashing import profile_hashes
from scfm.data.prepare import prepare
from scfm.evaluation.harness import Comparison, Method, compare
from scfm.evaluation.provenance import provenance
from scfm.evaluation.splits import Split, stratified_split
from scfm.metrics_file import read_metrics
from scfm.pretrained import UNASSIGNED
from scfm.recipe_reader import bundled, merged, read_recipe, read_yaml
from scfm.training.launch import keep_memory
from scfm.training.run import pretrain

if TYPE_CHECKING:
    from numpy.typing import NDArray

LABEL = "cell_type"
METRICS = ("macro_f1", "accuracy")
MIXERS = ("favor", "linear", "softmax")
VARIABLE, EXPRESSED = 600, 600  # genes

PRETRAINING: dict[str, Any] = {  # what stands not here is as published
    "data": {
        "max_genes": VARIABLE + EXPRESSED,
        "cells_per_batch": 16,
        "tokens_per_pack": 20000,
        "valid_fraction": 0.02,
    },
    "model": {
        "name": "scbert",
        "width": 64,
        "heads": 4,
        "layers": 2,
        "hidden": 128,
        "performer": {"head_width": 16},
    },
    "objectives": [{"name": "masked_bin"}],
    "optimizer": {"lr": 6e-3, "warmup": 0.1, "schedule": "cosine", "clip": 1.0},
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "check_val_every_n_epoch": 10_000,  # scfm validates once more at the end of every run
        "log_every_n_steps": 50,
    },
    "checkpoint": {"every_steps": 1_000_000},
}
FINE_TUNING: dict[str, Any] = {
    "data": {"cells_per_batch": 16, "tokens_per_pack": 20000, "valid_fraction": 0.1},
    "optimizer": {"lr": 1e-3},
    "trainer": {"accelerator": "cpu", "max_epochs": 10, "log_every_n_steps": 50},
    "checkpoint": {"every_steps": 1_000_000, "patience": 4},
}

Row = dict[str, Any]


def by_ensembl(path: Path) -> AnnData:
    """Read cells with Ensembl ids as gene names; genes without one, or named twice, are left out."""
    adata = anndata.read_h5ad(path)
    ids = adata.var["ensembl_id"].astype(str)
    adata = adata[:, ((ids != "") & ~ids.duplicated(keep=False)).to_numpy()].copy()
    adata.var_names = adata.var["ensembl_id"].astype(str).tolist()
    return adata


def informative_genes(sources: list[AnnData], measured: list[str]) -> list[str]:
    """Choose the genes of the vocabulary among those that all sources and the training cells measure.

    Half are the most variable ones (mean rank over the sources of scanpy's normalised dispersion), half the most
    expressed of the rest: without these, the total by which log2 bins divide would be a fraction of a cell's own.
    """
    import scanpy

    common = sorted(set(measured).intersection(*(source.var_names for source in sources)))
    rank, level = np.zeros(len(common)), np.zeros(len(common))
    for source in sources:
        cells = AnnData(source[:, common].X.astype(np.float32), var=source[:, common].var[[]].copy())
        scanpy.pp.normalize_total(cells, target_sum=1e4)
        level += np.asarray(cells.X.mean(0)).ravel()
        scanpy.pp.log1p(cells)
        scanpy.pp.highly_variable_genes(cells, flavor="seurat", n_top_genes=VARIABLE)
        dispersion = cells.var["dispersions_norm"].fillna(-np.inf)
        rank += dispersion.rank(ascending=False, method="first").to_numpy()
    variable = np.argsort(rank, kind="stable")[:VARIABLE]
    rest = [gene for gene in np.argsort(-level, kind="stable") if gene not in set(variable.tolist())]
    return sorted(common[gene] for gene in [*variable, *rest[:EXPRESSED]])


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep progress lines off the terminal; the runs keep them in log.txt."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def pretrained(shards: Path, out: Path, seed: int, steps: int, mixer: str) -> Row:
    """Pretrain once; return what the last weights reach on the held-out cells, beside the trivial predictions."""
    started = time.process_time()
    sections = {"seed": seed, "out": str(out), "data": {"shards": str(shards)}, "model": {"mixer": mixer}}
    recipe = read_recipe(None, merged(PRETRAINING, merged(sections, {"trainer": {"max_steps": steps}})))
    with quietly():
        pretrain(recipe)
    rows = read_metrics(out / "metrics.csv")
    last = {metric: value for step, metric, value in rows if step == steps}
    return {
        "mixer": mixer,
        "seed": seed,
        "loss": last["valid/masked_bin"],
        "accuracy": last["valid/masked_bin_accuracy"],
        "cpu_seconds": time.process_time() - started,
        "baselines": majority_bins_of(rows),
    }


def fresh(folder: Path, model: Path, seed: int) -> Path:
    """Write the same network with fresh weights, as pretraining would have started from."""
    files = load_model(model)[1]
    files.training_data, files.cell_hashes = {"stage": "none: fresh weights"}, None
    torch.manual_seed(seed)
    save_model(folder, files.build(), files)
    return folder


class OfSeed:
    """Fine-tunes the model of each seed, and counts the cells that a threshold leaves unassigned.

    Args:
        name: what the tables call it.
        folder: holds seed<n>/model, where fine-tuning starts.
        runs: receives a run directory per seed.
        novel: cells of types that the training cells lack.
    """

    def __init__(self, name: str, folder: Path, runs: Path, novel: AnnData) -> None:
        self.name, self.folder, self.runs, self.novel = name, folder, runs, novel
        self.recipe = merged(read_yaml(bundled("finetune/scbert-annotation.yaml")), FINE_TUNING)
        self.training_hashes: NDArray[np.uint64] | None = None
        self.classes: list[str] = []
        self.unassigned: list[dict[str, float]] = []
        self.cpu_seconds: list[float] = []
        self.epochs: list[int] = []

    def describe(self) -> str:
        return "scBERT with its head of a number per gene, all weights fine-tuned"

    def fit(self, adata: AnnData, label: str, seed: int) -> OfSeed:
        started, out = time.process_time(), self.runs / f"seed{seed}"
        start = scfm.load(self.folder / f"seed{seed}" / "model")
        self.training_hashes = start.files.cell_hashes
        with quietly():
            self.tuned = start.finetune(adata, **merged(self.recipe, {"seed": seed, "out": str(out)}))
        (head,) = self.tuned.files.heads
        self.classes = head.labels or []
        self.epochs.append(sum(name == "valid/loss" for _, name, _ in read_metrics(out / "metrics.csv")))
        self.cpu_seconds.append(time.process_time() - started)
        return self

    def predict(self, adata: AnnData) -> tuple[NDArray, NDArray]:
        known, novel = (self.tuned.predict(cells.copy(), unassigned_below=0.5) for cells in (adata, self.novel))
        shares = {"known": known, "other": novel}
        self.unassigned.append({k: float((v.obs["annotation"] == UNASSIGNED).mean()) for k, v in shares.items()})
        probabilities = known.obsm["annotation_probabilities"]
        return np.array(self.classes)[probabilities.argmax(1)], probabilities


class OnTheVocabulary(BalancedLogisticRegression):
    """Logistic regression on the genes that scBERT reads."""

    def __init__(self, genes: list[str]) -> None:
        super().__init__()
        self.name = f"logistic regression, {len(genes):,} genes"
        self.genes = genes

    def fit(self, adata: AnnData, label: str, seed: int = 0) -> BalancedLogisticRegression:
        return super().fit(adata[:, self.genes], label, seed)

    def predict(self, adata: AnnData) -> tuple[NDArray[np.str_], NDArray[np.float64]]:
        return super().predict(adata[:, self.genes])


def cells_and_splits(reference: AnnData, query: AnnData, seeds: list[int], n_train: int) -> tuple[AnnData, list[Split]]:
    """Return both sets on the genes they share, and for each seed which cells train; the query is tested whole."""
    adata = anndata.concat([reference, query], join="inner", index_unique="-", keys=["reference", "query"])
    labels = reference.obs[LABEL].to_numpy(dtype=str)
    test = np.arange(reference.n_obs, adata.n_obs)
    protocol = f"{n_train} cells of the reference, in its shares of types; judged on all cells of the query"
    drawn = [stratified_split(labels, n_train / reference.n_obs, seed).test for seed in seeds]
    return adata, [Split(rows, test, seed, protocol) for rows, seed in zip(drawn, seeds, strict=True)]


def spread(values: list[float]) -> str:
    """Return the mean and the standard deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def masked_bin_table(runs: list[Row]) -> list[str]:
    """Return the Markdown table of pretraining: a mixer a line, then the trivial predictions."""
    heading = ["prediction of hidden bins", "seeds", "accuracy", "cross entropy", "CPU s a run"]
    lines = [line(*heading), line(*["---"] * len(heading))]
    for mixer in dict.fromkeys(run["mixer"] for run in runs):
        same = [run for run in runs if run["mixer"] == mixer]
        figures = [spread([run[key] for run in same]) for key in ("accuracy", "loss")]
        cpu = statistics.fmean(run["cpu_seconds"] for run in same)
        lines.append(line(f"scBERT, {mixer}", f"{len(same)}", *figures, f"{cpu:.0f}"))
    first = [run["baselines"] for run in runs if run["mixer"] == MIXERS[0]]
    lines += [line(name, f"{len(first)}", spread([one[name] for one in first]), "", "") for name in first[0]]
    return lines


def annotation_table(comparison: Comparison, methods: list[OfSeed]) -> list[str]:
    """Return the Markdown table of annotation: a method a line."""
    heading = [
        "method",
        "macro-F1",
        "accuracy",
        "of known types unassigned",
        "of other types unassigned",
        "CPU s a fit",
    ]
    lines = [line(*heading), line(*["---"] * len(heading))]
    own = {method.name: method for method in methods}
    for name in comparison.kinds:
        scores = [spread([run.scores.values[metric] for run in comparison.runs_of(name)]) for metric in METRICS]
        more = ["", "", ""]
        if name in own:
            told, seconds = own[name].unassigned, own[name].cpu_seconds
            more = [spread([one[kind] for one in told]) for kind in told[0]] + [f"{statistics.fmean(seconds):.0f}"]
        lines.append(line(name, *scores, *more))
    return lines


def annotated(options: argparse.Namespace, genes: list[str], reference: AnnData) -> Row:
    """Fine-tune every seed's model and the fresh ones, score them beside the baselines, and return all figures."""
    for seed in options.seeds:
        fresh(options.work / "fresh" / f"seed{seed}" / "model", options.work / "favor" / f"seed{seed}" / "model", seed)
    query = by_ensembl(options.data / "annotation" / "pbmc3k_10x.h5ad")
    query = query[query.obs[LABEL] != "unknown"].copy()
    known = query.obs[LABEL].astype(str).isin(set(reference.obs[LABEL].astype(str))).to_numpy()
    adata, splits = cells_and_splits(reference, query[known].copy(), options.seeds, options.train)
    methods = [
        OfSeed(name, options.work / place, options.work / f"annotation-{place}", query[~known].copy())
        for name, place in (("scBERT, pretrained", "favor"), ("scBERT, not pretrained", "fresh"))
    ]
    store = scfm.load(options.work / "favor" / f"seed{options.seeds[0]}" / "model").store(adata)
    keys = store.vocabulary.gene_keys
    hashes = np.concatenate([profile_hashes(b.offsets, b.genes, b.values, keys) for b in store.blocks])
    judged: list[Method] = [*methods, OnTheVocabulary(genes)]
    comparison = compare(judged, adata, LABEL, splits, cell_hashes=hashes)
    print("\n".join(annotation_table(comparison, methods)))
    return {
        "train_cells": options.train,
        "test_cells": int(known.sum()),
        "annotation": [row for row in comparison.rows() if row["metric"] in METRICS],
        "f1": [
            {
                "method": run.method,
                "seed": run.seed,
                **dict(zip(run.scores.labels, run.scores.f1.tolist(), strict=True)),
            }
            for run in comparison.runs
        ],
        "leakage": [
            {"method": run.method, "seed": run.seed, **vars(run.leakage)} for run in comparison.runs if run.leakage
        ],
        "own": {m.name: {"unassigned": m.unassigned, "validations": m.epochs, "cpu": m.cpu_seconds} for m in methods},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with pretrain/ and annotation/")
    parser.add_argument("--work", type=Path, required=True, help="folder for shards and runs; must not exist")
    parser.add_argument("--steps", type=int, default=250, help="optimizer steps of pretraining")
    parser.add_argument("--train", type=int, default=300, help="labelled cells that train")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--mixers", action="store_true", help="compare mixers in pretraining, on the first seed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()  # what `scfm pretrain` does too
    origin, started = provenance(), time.process_time()
    options.work.mkdir(parents=True)

    files = sorted((options.data / "pretrain").glob("*.h5ad"))
    reference = by_ensembl(options.data / "annotation" / "pbmc_facs_zheng.h5ad")
    genes = informative_genes([by_ensembl(file) for file in files], reference.var_names.tolist())
    (options.work / "genes.txt").write_text("\n".join(genes) + "\n")
    with quietly():
        prepare(files, options.work / "shards", vocabulary=options.work / "genes.txt")

    runs = []
    planned = [(name, options.seeds[0]) for name in MIXERS] if options.mixers else [("favor", n) for n in options.seeds]
    for mixer, seed in planned:
        out = options.work / mixer / f"seed{seed}"
        runs.append(pretrained(options.work / "shards", out, seed, options.steps, mixer))
        print(json.dumps(runs[-1]), flush=True)
    result = {"bench": "scbert_annotation", "steps": options.steps, "genes": len(genes), "pretraining": runs}
    print("\n".join(masked_bin_table(runs)))
    if not options.mixers:
        result |= annotated(options, genes, reference)
    result |= {"settings": {"pretraining": PRETRAINING, "fine-tuning": FINE_TUNING}, **origin}
    result["cpu_seconds"] = time.process_time() - started
    (options.work / "results.json").write_text(json.dumps(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
