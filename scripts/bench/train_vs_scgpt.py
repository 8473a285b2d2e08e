"""Training speed beside scGPT 0.2.4 from PyPI: same shapes, same objective, one thread each, steps interleaved.

scGPT does not install beside a current torch. In an isolated environment that has scfm:

    pip install --no-deps scgpt==0.2.4
    PYTHONPATH=<stand-ins for torchtext and IPython> python scripts/bench/train_vs_scgpt.py

One step is forward and backward of GEP + GEPC with full attention, width 128, 4 layers, 4 heads, hidden 128, 8 cells of
512 genes, 40 % of them hidden, vocabulary 60,697; the dense gradient of the gene embedding is part of it. `--optimizer`
adds each side's own optimizer step (Adam there, fused AdamW here). Times are thread CPU time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from scfm.data.batch import PackedBatch
from scfm.evaluation.provenance import provenance
from scfm.model import ScGPT
from scfm.objectives import build_objectives
from scfm.recipe import ModelConfig, ObjectiveConfig, OptimizerConfig
from scfm.training.launch import keep_memory
from scfm.training.optimizers import build_optimizer

CELLS, LENGTH, HIDDEN_SHARE = 8, 512, 0.4
VOCABULARY, PAD, CLS, BINS = 60_697, 60_694, 60_695, 51
WIDTH, HEADS, LAYERS = 128, 4, 4

DROPOUTS = (0.0, 0.2)
PEER = "scGPT 0.2.4, fp32"

Step = Callable[[], None]
Kind = tuple[str, float]


def made_up_batch() -> PackedBatch:
    """Return 8 cells of 512 tokens, `<cls>` first, the hidden genes last."""
    torch.manual_seed(0)
    genes = torch.randint(0, PAD, (CELLS, LENGTH))
    genes[:, 0] = CLS
    targets = torch.randint(1, BINS, (CELLS, LENGTH)).float()
    known = LENGTH - int((LENGTH - 1) * HIDDEN_SHARE)
    values = targets.clone()
    values[:, known:], values[:, 0] = -1, -2
    return PackedBatch(
        genes=genes.flatten().int(),
        values=values.flatten(),
        targets=targets.flatten(),
        cu_seqlens=torch.arange(0, CELLS * LENGTH + 1, LENGTH, dtype=torch.int32),
        n_known=torch.full((CELLS,), known, dtype=torch.int32),
        cell_id=torch.arange(CELLS),
        total_cells=CELLS,
        total_unknown=CELLS * (LENGTH - known),
    )


def scfm_step(batch: PackedBatch, dropout: float, bf16: bool, optimize: bool) -> Step:
    """Return one training step of scfm."""
    objectives = build_objectives([ObjectiveConfig("gep"), ObjectiveConfig("gepc")], n_bins=BINS)
    config = ModelConfig(width=WIDTH, heads=HEADS, layers=LAYERS, hidden=WIDTH, dropout=dropout, attention="full")
    heads = [head for objective in objectives for head in objective.heads()]
    network = ScGPT(config, VOCABULARY, PAD, BINS, {}, {}, heads).train()
    optimizer = build_optimizer(network, OptimizerConfig(), fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = network(batch)
            loss = sum(objective.loss(batch, output)[0] for objective in objectives)
        loss.backward()
        if optimize:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def scgpt_step(batch: PackedBatch, dropout: float, optimize: bool) -> Step:
    """Return one training step of scGPT."""
    from scgpt.model import TransformerModel

    vocabulary = {"<pad>": PAD, "<cls>": CLS}
    network = TransformerModel(
        VOCABULARY, WIDTH, HEADS, WIDTH, LAYERS, nlayers_cls=3, n_cls=1, vocab=vocabulary, dropout=dropout,
        pad_token="<pad>", pad_value=-2, do_mvc=True, use_fast_transformer=False,
    ).train()  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    shape = (CELLS, LENGTH)
    genes, values, targets = batch.genes.view(shape).long(), batch.values.view(shape), batch.targets.view(shape)
    hidden = batch.unknown_mask.view(shape)

    def step() -> None:
        output = network(genes, values, src_key_padding_mask=genes.eq(PAD), MVC=True)
        errors = [(output[name] - targets).square() * hidden for name in ("mlm_output", "mvc_output")]
        (sum(error.sum() for error in errors) / hidden.sum()).backward()
        if optimize:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def serve(pipe: Connection, side: str, optimize: bool) -> None:
    """Hold one side's models in a process of its own, as its users run it, and time a step whenever asked."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    batch = made_up_batch()
    steps: dict[Kind, Step] = {}
    if side == "scfm":
        keep_memory()  # what `scfm pretrain` does too
        for dropout in DROPOUTS:
            steps["scfm, fp32", dropout] = scfm_step(batch, dropout, False, optimize)
            steps["scfm, bf16", dropout] = scfm_step(batch, dropout, True, optimize)
    else:
        steps = {(PEER, dropout): scgpt_step(batch, dropout, optimize) for dropout in DROPOUTS}
    pipe.send(list(steps))
    while (kind := pipe.recv()) is not None:
        started = time.thread_time()
        steps[kind]()
        pipe.send(time.thread_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each kind, interleaved")
    parser.add_argument("--optimizer", action="store_true", help="include the optimizer step")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    pipes = {}
    for side in ("scgpt", "scfm"):
        here, there = spawn.Pipe()
        spawn.Process(target=serve, args=(there, side, options.optimizer), daemon=True).start()
        pipes |= dict.fromkeys(here.recv(), here)
    times: dict[Kind, list[float]] = {kind: [] for kind in pipes}
    for repeat in range(options.repeats + 1):
        for kind, pipe in pipes.items():
            pipe.send(kind)
            seconds = pipe.recv()
            if repeat:  # the first round warms up
                times[kind].append(seconds)
    for pipe in set(pipes.values()):
        pipe.send(None)
    rows = []
    for (name, dropout), spent in times.items():
        peer = times[PEER, dropout]
        row = {
            "model": name,
            "dropout": dropout,
            "cells_per_second_median": round(CELLS / statistics.median(spent), 1),
            "cells_per_second_best": round(CELLS / min(spent), 1),
            "times_scgpt_median": round(statistics.median(peer) / statistics.median(spent), 2),
            "times_scgpt_best": round(min(peer) / min(spent), 2),
        }
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    print(json.dumps({"bench": "train_vs_scgpt", "optimizer": options.optimizer, "rows": rows, **provenance()}))


if __name__ == "__main__":
    main()
