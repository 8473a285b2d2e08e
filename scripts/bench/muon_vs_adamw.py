"""Muon beside AdamW on the same cells, from the same weights, for the same steps: what each reaches, and how fast.

    scfm prepare CELLS.h5ad --out SHARDS
    OMP_NUM_THREADS=1 taskset -c 1 python scripts/bench/muon_vs_adamw.py --shards SHARDS

Every run is a `scfm pretrain` of its own: a model of width 64 and 2 layers, generative attention, GEP + GEPC by squared
error over bins, up to 200 genes of a cell, 16 cells a step, warm-up and cosine. The seed draws the weights, the order
of the cells and the hidden genes, those of the held-out cells too; runs of one seed differ in optimizer and rate alone,
and share what the trivial predictions lose. Runs of both optimizers alternate, so that a machine that drifts is fair to
both. Seconds a step are wall time, the median over stretches of 50 steps; CPU seconds are those of a whole run, with
its start, its baselines and its validation.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from scfm.baselines.mean_value import baselines_of
from scfm.evaluation.provenance import provenance
from scfm.metrics_file import read_metrics
from scfm.recipe_reader import read_recipe
from scfm.training.launch import keep_memory
from scfm.training.run import pretrain

CELLS, LOG_EVERY = 16, 50

Run = dict[str, Any]


def recipe_of(name: str, rate: float, steps: int) -> dict[str, Any]:
    """Return what all runs share, but for the optimizer and its rate."""
    return {
        "data": {"max_genes": 200, "cells_per_batch": CELLS, "tokens_per_pack": 8192, "valid_fraction": 0.1},
        "model": {"width": 64, "heads": 2, "layers": 2, "hidden": 64, "dropout": 0.1, "attention": "generative"},
        "objectives": [{"name": "gep"}, {"name": "gepc"}],
        "optimizer": {"name": name, "lr": rate, "weight_decay": 0.01, "warmup": 0.1, "schedule": "cosine"},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": steps,
            "check_val_every_n_epoch": 10_000,  # scfm validates once more at the end of every run
            "log_every_n_steps": LOG_EVERY,
        },
        "checkpoint": {"every_steps": steps + 1},
    }


def run(shards: str, name: str, rate: float, seed: int, steps: int) -> Run:
    """Train once; return the losses of the last weights on held-out cells, and the time it took."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        recipe = read_recipe(None, recipe_of(name, rate, steps))
        recipe.seed, recipe.data.shards, recipe.out = seed, shards, f"{folder}/run"
        pretrain(recipe)
        rows = read_metrics(Path(folder) / "run" / "metrics.csv")
    last = {metric: value for step, metric, value in rows if step == steps}
    speeds = [value for _, metric, value in rows if metric == "speed/cells_per_second"]
    return {
        "optimizer": name,
        "lr": rate,
        "seed": seed,
        "gep": last["valid/gep"],
        "gepc": last["valid/gepc"],
        "seconds_per_step": CELLS / statistics.median(speeds[1:] or speeds),
        "cpu_seconds": time.process_time() - started,
        "baselines": baselines_of(rows),
    }


def spread(values: list[float]) -> str:
    """Return the mean and the standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {deviation:.3f}"


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def table(runs: list[Run]) -> list[str]:
    """Return the Markdown table: an (optimizer, rate) a line, then the trivial predictions."""
    heading = ["optimizer", "lr", "valid gep", "valid gepc", "ms a step", "CPU s a run", "seeds below gene mean"]
    lines = [line(*heading), line(*["---"] * len(heading))]
    for name, rate in sorted({(run["optimizer"], run["lr"]) for run in runs}):
        same = [run for run in runs if (run["optimizer"], run["lr"]) == (name, rate)]
        losses = [spread([run[key] for run in same]) for key in ("gep", "gepc")]
        wall = statistics.fmean(run["seconds_per_step"] for run in same) * 1e3
        cpu = statistics.fmean(run["cpu_seconds"] for run in same)
        better = sum(run["gep"] < run["baselines"]["gene mean"] for run in same)
        lines.append(line(name, f"{rate:g}", *losses, f"{wall:.1f}", f"{cpu:.1f}", f"{better} of {len(same)}"))
    by_seed = {run["seed"]: run["baselines"] for run in runs}
    for trivial in next(iter(by_seed.values())):
        loss = spread([losses[trivial] for losses in by_seed.values()])
        lines.append(line(trivial, "", loss, loss, "", "", ""))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="shard directory, from `scfm prepare`")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of every run")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 2e-3, 8e-3], help="peak learning rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()  # what `scfm pretrain` does too
    origin = provenance()  # of the code that runs, whatever is committed meanwhile
    runs = []
    for seed in options.seeds:
        for rate in options.rates:
            for name in ("adamw", "muon"):
                runs.append(run(options.shards, name, rate, seed, options.steps))
                print(json.dumps(runs[-1]), flush=True)
    print("\n".join(table(runs)))
    print(json.dumps({"bench": "muon_vs_adamw", "steps": options.steps, "runs": runs, **origin}))


if __name__ == "__main__":
    main()
