"""Pretraining speed beside a dense-mask model in scGPT's original arrangement (dense_peer.py), steps interleaved.

    python scripts/bench/train_vs_dense.py                  # one CPU thread, thread CPU time
    python scripts/bench/train_vs_dense.py --device cuda    # CUDA events, the 51 M geometry, bf16 autocast

One step is forward and backward of GEP + GEPC + cell_prompt: two passes under the generative mask, half of the genes
unknown, and the dense gradient of the gene embedding. Each side runs in processes of its own; on a CPU each side once
under glibc's default allocator and once under the one that keeps freed memory, as `scfm pretrain` sets it, so that a
ratio need not mix the two. With dropout the peer drops attention weights too, as the original does; scfm does not. Rows
of the peer without that say what it costs. `--width`, `--layers` ... shrink it for a try.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from dense_peer import DenseMaskModel, Streams, pretraining_loss

from scfm.data.batch import PackedBatch
from scfm.evaluation.provenance import provenance
from scfm.model import ScGPT
from scfm.model.attention import pick_backend
from scfm.objectives import build_objectives
from scfm.recipe import ModelConfig, ObjectiveConfig
from scfm.training.launch import keep_memory

VOCABULARY, PAD, CLS, BINS = 60_697, 60_694, 60_695, 51
UNKNOWN_SHARE = 0.5
DROPOUTS = (0.2, 0.0)
# the original's own arrangement of attention; one call under an (M, M) mask; that without dropout of attention weights
PEERS = ("two calls", "dense mask", "dense mask, no attention dropout")
INNER = 3  # steps between two CUDA events

Step = Callable[[], None]


@dataclass
class Shape:
    """The geometry of model and batch; `tokens` per cell, `<cls>` included."""

    width: int
    layers: int
    heads: int
    tokens: int
    cells: int


SHAPES = {"cpu": Shape(128, 4, 4, 512, 8), "cuda": Shape(512, 12, 8, 1200, 54)}


class Kind(NamedTuple):
    """What is timed; `memory` is the allocator's setting: default or kept."""

    model: str
    precision: str
    dropout: float
    memory: str


class Timing(NamedTuple):
    """Seconds per step, and the most memory of the device that torch held in it, in GiB (CUDA only)."""

    seconds: float
    peak: float | None


def kinds(side: str, memory: str, device: str) -> list[Kind]:
    """Return what a process times."""
    models = PEERS if side == "peer" else ("scfm",)
    precisions = ("bf16",) if device == "cuda" else ("fp32", "bf16")
    return [
        Kind(model, precision, dropout, memory)
        for dropout in DROPOUTS
        for model in models
        for precision in precisions
        if dropout or model != PEERS[2]
    ]


def made_up_batch(shape: Shape) -> PackedBatch:
    """Return cells of one length, `<cls>` first and the unknown genes last."""
    torch.manual_seed(0)
    cells, tokens = shape.cells, shape.tokens
    genes = torch.randint(0, PAD, (cells, tokens))
    genes[:, 0] = CLS
    targets = torch.randint(1, BINS, (cells, tokens)).float()
    unknown = int((tokens - 1) * UNKNOWN_SHARE)
    values = targets.clone()
    values[:, tokens - unknown :], values[:, 0] = -1, -2
    return PackedBatch(
        genes=genes.flatten().int(),
        values=values.flatten(),
        targets=targets.flatten(),
        cu_seqlens=torch.arange(0, cells * tokens + 1, tokens, dtype=torch.int32),
        n_known=torch.full((cells,), tokens - unknown, dtype=torch.int32),
        cell_id=torch.arange(cells),
        total_cells=cells,
        total_unknown=cells * unknown,
        levels=torch.arange(-2, BINS).float(),  # as the loader says it
    )


def build_step(kind: Kind, shape: Shape, batch: PackedBatch, device: str) -> Step:
    """Return one training step, on a device, of a model and a batch that are moved there."""
    config = ModelConfig(
        width=shape.width, heads=shape.heads, layers=shape.layers, hidden=shape.width, dropout=kind.dropout,
        attention="generative", unknown_output_projection=False,
    )  # fmt: skip
    torch.manual_seed(0)
    build = scfm_loss if kind.model == "scfm" else peer_loss
    network, loss_of = build(kind, config, batch, device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=kind.precision == "bf16"):
            loss = loss_of()
        loss.backward()
        network.zero_grad(set_to_none=True)

    return step


def scfm_loss(
    kind: Kind, config: ModelConfig, batch: PackedBatch, device: str
) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """Return scfm's model and its loss, put together as the training module does."""
    objectives = build_objectives([ObjectiveConfig(name) for name in ("gep", "gepc", "cell_prompt")], n_bins=BINS)
    heads = {head.task: head for objective in objectives for head in objective.heads()}
    network = ScGPT(config, VOCABULARY, PAD, BINS, {}, {}, list(heads.values())).to(device).train()
    batch = batch.to(device)

    def loss() -> torch.Tensor:
        output = network(batch)
        second = network(batch, cell_prompt=output.cell.detach())
        output.predictions["cell_prompt"] = second.predictions["gep"]
        return torch.stack([objective.loss(batch, output)[0] for objective in objectives]).sum()

    return network, loss


def peer_loss(
    kind: Kind, config: ModelConfig, batch: PackedBatch, device: str
) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """Return the peer and its loss."""
    arrangement = "streams" if kind.model == PEERS[0] else "mask"
    attention_dropout = 0.0 if kind.model == PEERS[2] else config.dropout
    network = DenseMaskModel(config, VOCABULARY, PAD, arrangement, attention_dropout).to(device).train()
    streams = Streams.of(batch, PAD).to(device)
    return network, lambda: pretraining_loss(network, streams)


def time_on_cpu(step: Step) -> Timing:
    started = time.thread_time()
    step()
    return Timing(time.thread_time() - started, None)


def time_on_cuda(step: Step) -> Timing:
    """Time steps after one that refills the allocator, and hand its memory back: two processes share the device."""
    step()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start.record()
    for _ in range(INNER):
        step()
    end.record()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.empty_cache()
    return Timing(start.elapsed_time(end) / 1000 / INNER, peak)


def serve(pipe: Connection, todo: list[Kind], shape: Shape, device: str) -> None:
    """Hold models in a process of its own, and time a step of one whenever asked; None where its memory runs out."""
    torch.set_num_threads(1)
    if todo[0].memory == "kept":
        keep_memory()
    batch = made_up_batch(shape)
    steps = {kind: build_step(kind, shape, batch, device) for kind in todo}
    clock = time_on_cuda if device == "cuda" else time_on_cpu
    pipe.send("ready")
    while (kind := pipe.recv()) is not None:
        try:
            timing = clock(steps[kind])
        except torch.OutOfMemoryError:
            timing = None
        if timing is None and device == "cuda":  # outside the handler, which still holds the step's tensors
            torch.cuda.empty_cache()
        pipe.send(timing)


def measure(shape: Shape, device: str, repeats: int) -> dict[Kind, list[Timing | None]]:
    """Time all kinds in turn, round by round; the first round warms up."""
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[Kind, Connection] = {}
    memories = ("default",) if device == "cuda" else ("default", "kept")
    for memory in memories:
        for side in ("peer", "scfm"):
            todo = kinds(side, memory, device)
            here, there = spawn.Pipe()
            spawn.Process(target=serve, args=(there, todo, shape, device), daemon=True).start()
            there.close()  # so that a process that dies raises EOFError here instead of hanging
            here.recv()
            pipes |= dict.fromkeys(todo, here)
    # what is compared is timed close together: machines drift
    order = sorted(pipes, key=lambda kind: (kind.dropout, kind.memory))
    times: dict[Kind, list[Timing | None]] = {kind: [] for kind in order}
    for repeat in range(repeats + 1):
        for kind in order:
            pipes[kind].send(kind)
            timing = pipes[kind].recv()
            if repeat:
                times[kind].append(timing)
    for pipe in set(pipes.values()):
        pipe.send(None)
    return times


def summarise(times: dict[Kind, list[Timing | None]], cells: int, device: str) -> list[dict[str, Any]]:
    """Return a row per kind: cells/s, and how often as fast as each form of the peer it is.

    The peer's are those in fp32 (bf16 on CUDA) with the same dropout: `times` under the same allocator, `times_as_run`
    under the default one.
    """
    precision = "bf16" if device == "cuda" else "fp32"
    medians = {
        kind: statistics.median(timing.seconds for timing in spent if timing)
        for kind, spent in times.items()
        if spent and all(spent)
    }

    def ratios(kind: Kind, memory: str) -> dict[str, float]:
        peers = {model: medians.get(Kind(model, precision, kind.dropout, memory)) for model in PEERS}
        return {model: round(peer / medians[kind], 2) for model, peer in peers.items() if peer and kind in medians}

    rows = []
    for kind, spent in times.items():
        done = [timing for timing in spent if timing]
        row: dict[str, Any] = kind._asdict() | {
            "cells_per_second_median": round(cells / medians[kind], 2) if kind in medians else None,
            "cells_per_second_best": round(cells / min(timing.seconds for timing in done), 2) if done else None,
            "times": ratios(kind, kind.memory),
            "times_as_run": ratios(kind, "default"),
        }
        if device == "cuda":
            row["peak_gib"] = round(max(timing.peak or 0.0 for timing in done), 1) if done else None
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    head = ["dropout", "allocator", "model", "precision", "cells/s median", "best", *(f"x {name}" for name in PEERS)]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [row[name] for name in ("dropout", "memory", "model", "precision")]
        speeds = [row[f"cells_per_second_{name}"] or "out of memory" for name in ("median", "best")]
        lines.append([str(cell) for cell in [*cells, *speeds, *(row["times"].get(name, "") for name in PEERS)]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SHAPES), default="cpu")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each kind, interleaved")
    for name in Shape.__annotations__:
        parser.add_argument(f"--{name}", type=int, help="instead of what the device stands for")
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in Shape.__annotations__ if getattr(options, name) is not None}
    shape = Shape(**(asdict(SHAPES[options.device]) | given))
    rows = summarise(measure(shape, options.device, options.repeats), shape.cells, options.device)
    print(table(rows))
    about = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu, one thread",
        "scfm_attention": pick_backend(options.device, torch.bfloat16 if options.device == "cuda" else torch.float32)[
            0
        ],
        "shape": asdict(shape),
        "unknown_share": UNKNOWN_SHARE,
        "repeats": options.repeats,
    }
    print(json.dumps({"bench": "train_vs_dense", **about, "rows": rows, **provenance()}))


if __name__ == "__main__":
    main()
