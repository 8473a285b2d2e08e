"""Embedding cells beside scGPT 0.2.4's embed_data: same whole-human-sized checkpoint, same real cells, interleaved.

scGPT does not install beside a current torch. In an isolated environment that has scfm:

    pip install --no-deps scgpt==0.2.4
    PYTHONPATH=<stand-ins for torchtext and IPython> python scripts/bench/embed_vs_scgpt.py CELLS.h5ad \\
        --layout published_whole_human_layout.json --vocabulary scgpt_census_vocab.json.gz

The checkpoint holds random weights in the published layout (12 layers, width 512, vocabulary 60,697). Cells with more
than 1,199 known expressed genes are left out, and scGPT's ties are set to its pretraining rule (left), because its
random sampling and random ties would make the outputs differ. Each side runs in a process of its own with the same
number of threads; what is timed is embedding alone, without loading the model. Where the CPU has bf16 products, scfm is
timed in bf16 too; scGPT's embed_data computes in float32, always.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import multiprocessing
import statistics
import tempfile
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import torch

from scfm.checkpoints.convert import convert
from scfm.evaluation.provenance import provenance
from scfm.model.precision import multiplies_bf16

MAX_GENES = 1199
SCFM = {"scfm": "fp32", "scfm_bf16": "bf16"}  # side -> precision


def write_checkpoint(folder: Path, layout: Path, vocabulary: Path) -> None:
    """Write a folder as scGPT publishes it, with random weights of the given layout."""
    described = json.loads(layout.read_text())
    torch.manual_seed(0)
    state = {}
    for name, shape in described["keys"].items():
        fan_in = shape[-1]
        state[name] = torch.randn(shape) / fan_in**0.5 if len(shape) > 1 else torch.randn(shape) * 0.02
        if "norm" in name and name.endswith("weight"):
            state[name] += 1
    folder.mkdir()
    torch.save(state, folder / "best_model.pt")
    (folder / "args.json").write_text(json.dumps(described["args_json_whole_human"]))
    content = gzip.decompress(vocabulary.read_bytes()) if vocabulary.suffix == ".gz" else vocabulary.read_bytes()
    (folder / "vocab.json").write_bytes(content)


def chosen_cells(path: Path, folder: Path, n_cells: int) -> anndata.AnnData:
    """Return the cells with the most known expressed genes that need no sampling, symbols as var index."""
    adata = anndata.read_h5ad(path)
    names = adata.var.get("feature_name", adata.var_names)
    adata.var_names = np.asarray(names, dtype=str)
    adata.var_names_make_unique()
    adata.var["feature_name"] = adata.var_names.to_numpy()
    known = set(json.loads((folder / "vocab.json").read_text()))
    expressed = np.asarray((adata.X[:, adata.var_names.isin(known)] > 0).sum(1)).ravel()
    fitting = np.flatnonzero(expressed <= MAX_GENES)
    rows = np.sort(fitting[np.argsort(-expressed[fitting], kind="stable")[:n_cells]])
    print(f"{len(rows)} cells of {path.name}, {int(np.median(expressed[rows]))} known expressed genes in the median")
    return adata[rows].copy()


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of each row of one (n, D) with the same row of the other."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def closeness(embedded: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Return how close bf16 embeddings (n, D) are to float32 ones.

    Cells of one tissue are nearly parallel, and the more so for random weights: therefore also the cosine of what is
    left after subtracting the mean cell, and the cosine of two different cells.
    """
    plain, centred = cosines(embedded, exact), cosines(embedded - embedded.mean(0), exact - exact.mean(0))
    others = cosines(exact, np.roll(exact, 1, axis=0))
    return {
        "cosine_median": round(float(np.median(plain)), 6),
        "cosine_min": round(float(plain.min()), 6),
        "cosine_centred_median": round(float(np.median(centred)), 4),
        "cosine_centred_min": round(float(centred.min()), 4),
        "cosine_of_different_cells_median": round(float(np.median(others)), 6),
    }


def clocks() -> np.ndarray:
    """Return seconds of the wall's clock and of this process's CPU, which other work on the machine disturbs less."""
    return np.array([time.perf_counter(), time.process_time()])


def ratios(slow: list[np.ndarray], fast: list[np.ndarray], clock: int) -> dict[str, Any]:
    """Return how many times faster one side is than the other, in the median and round by round."""
    by_round = [round(float(a[clock] / b[clock]), 2) for a, b in zip(slow, fast, strict=True)]
    median = statistics.median(a[clock] for a in slow) / statistics.median(b[clock] for b in fast)
    return {"median": round(float(median), 2), "by_round": by_round}


def scfm_embed(folder: Path, precision: Any) -> Any:
    import scfm
    from scfm.training.launch import keep_memory

    keep_memory()
    model = scfm.load(folder / "native")

    def embed(adata: anndata.AnnData) -> tuple[np.ndarray, np.ndarray]:
        started = clocks()
        embedded = model.embed(adata, precision=precision).obsm["X_scfm"]
        return clocks() - started, embedded

    return embed


def scgpt_embed(folder: Path) -> Any:
    import scgpt.preprocess
    import scgpt.tasks.cell_emb as upstream

    multiprocessing.set_start_method("fork", force=True)  # its loader's workers are started from a local class
    scgpt.preprocess._digitize = functools.partial(scgpt.preprocess._digitize, side="one")
    seconds: list[np.ndarray] = []
    inner = upstream.get_batch_cell_embeddings

    def timed(*args: Any, **kwargs: Any) -> np.ndarray:
        started = clocks()
        embedded = inner(*args, **kwargs)
        seconds.append(clocks() - started)
        return embedded

    upstream.get_batch_cell_embeddings = timed

    def embed(adata: anndata.AnnData) -> tuple[np.ndarray, np.ndarray]:
        embedded = upstream.embed_data(adata, folder / "scgpt", device="cpu", use_fast_transformer=False)
        return seconds[-1], embedded.obsm["X_scGPT"]

    return embed


def serve(pipe: Connection, side: str, folder: Path, threads: int) -> None:
    """Hold one side's model in a process of its own, and embed whenever asked."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    adata = anndata.read_h5ad(folder / "cells.h5ad")
    embed = scgpt_embed(folder) if side == "scgpt" else scfm_embed(folder, SCFM[side])
    pipe.send("ready")
    while pipe.recv():
        pipe.send(embed(adata.copy()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path, help="h5ad file with raw counts and gene symbols")
    parser.add_argument("--layout", type=Path, required=True, help="published_whole_human_layout.json")
    parser.add_argument("--vocabulary", type=Path, required=True, help="scGPT's published vocab.json, may be gzipped")
    parser.add_argument("--n_cells", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds, interleaved, after one that warms up")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_checkpoint(folder / "scgpt", options.layout, options.vocabulary)
        convert(str(folder / "scgpt"), to="native", out=str(folder / "native"))
        chosen_cells(options.cells, folder / "scgpt", options.n_cells).write_h5ad(folder / "cells.h5ad")
        pipes = {}
        for side in ("scgpt", *(side for side, kind in SCFM.items() if kind == "fp32" or multiplies_bf16("cpu"))):
            pipes[side], there = spawn.Pipe()
            spawn.Process(target=serve, args=(there, side, folder, options.threads)).start()
            pipes[side].recv()
        seconds: dict[str, list[np.ndarray]] = {side: [] for side in pipes}
        embeddings = {}
        for repeat in range(options.repeats + 1):
            for side, pipe in pipes.items():
                pipe.send(True)
                spent, embeddings[side] = pipe.recv()
                print(f"round {repeat}: {side} {spent[0]:.1f} s, CPU {spent[1]:.1f} s", flush=True)
                if repeat:
                    seconds[side].append(spent)
        for pipe in pipes.values():
            pipe.send(False)
    difference = float(np.abs(embeddings["scfm"] - embeddings["scgpt"]).max())
    result: dict[str, Any] = {"bench": "embed_vs_scgpt", "cells": options.n_cells, "threads": options.threads}
    for clock, name in enumerate(["wall", "cpu"]):
        for side, spent in seconds.items():
            rate = options.n_cells / statistics.median(times[clock] for times in spent)
            result[f"{side}_cells_per_{name}_second"] = round(float(rate), 3)
            if side != "scgpt":
                result[f"{side}_times_scgpt_{name}"] = ratios(seconds["scgpt"], spent, clock)
        if "scfm_bf16" in seconds:
            result[f"bf16_times_fp32_{name}"] = ratios(seconds["scfm"], seconds["scfm_bf16"], clock)
    if "scfm_bf16" in embeddings:
        result["bf16_to_fp32"] = closeness(embeddings["scfm_bf16"], embeddings["scfm"])
    result |= {
        "largest_difference": difference,
        **provenance(),
    }
    print(json.dumps(result))
    if difference > 1e-5:
        raise SystemExit(f"the embeddings differ by {difference:.2g}; the ratio means nothing")


if __name__ == "__main__":
    main()
