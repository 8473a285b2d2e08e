"""`scfm plan`: what a run will take before it is launched, and on which assumptions that rests.

Time = FLOPs / (MFU x ceiling x devices) + optimizer steps + validation. FLOPs are those of `scfm.flops`, plus what the
pseudo-cells of filled packs cost. On a GPU the MFU is assumed; on the CPU at hand ceiling and MFU are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from scfm.ceiling import product_type
from scfm.errors import ScfmError
from scfm.flops import DEVICES, Work, training_flops
from scfm.memory import ADAM_STATES, USABLE, Memory, Place, Precision, free_memory, memory_of
from scfm.model import MODELS
from scfm.objectives import Objective, build_objectives
from scfm.recipe import Recipe, TaskConfig
from scfm.recipe_check import check
from scfm.workload import Cells, Packs, cells_of, mean_work, packs_of, schedule_of

ASSUMED_MFU = 0.38
WITHOUT_RECOMPUTATION = 3 / 4  # share of a step's FLOPs that are the model's where blocks run forward twice
HEAP = "memory: what is alive at the fullest moment; a small process held twice that (compiled products, heap)"
OPTIMIZER_TRAFFIC = 7  # numbers that AdamW moves per weight: reads weight, gradient, two states; writes all but one

DeviceName = Literal["h100", "h200", "a100", "a100-40", "l40s", "rtx4090", "cpu"]


@dataclass(frozen=True)
class Speed:
    """FLOP/s of one device, the share of it that a step reaches, and the seconds of one optimizer step."""

    ceiling: float
    mfu: float
    optimizer_seconds: float
    said: str


@dataclass(frozen=True)
class Plan:
    """A run before it is launched.

    Attributes:
        device, devices: what it is planned for, and how many.
        parameters: numbers of weights by part, `total` and `trained`.
        flops_per_cell: FLOPs of training on one cell, at the first and at the last step (objectives may start later).
        tokens_per_cell: mean.
        packs: how a global batch falls into packs.
        memory: bytes on one device by part, and `total`.
        memory_available: bytes of one device.
        largest_pack: the largest `data.tokens_per_pack` that fits; 0 where none does.
        ceiling: FLOP/s of one device.
        mfu: share of the ceiling that the run is taken to reach, filling not counted.
        steps: optimizer steps; None where the number of cells is not known.
        validations: passes over the cells held out.
        seconds: of the whole run; None where the steps are not known.
        device_hours: hours times devices.
        checkpoint_bytes: of a checkpoint to resume from.
        model_bytes: of the exported model.
        assumptions: what all this rests on, a line each.
    """

    device: str
    devices: int
    parameters: dict[str, int]
    flops_per_cell: tuple[float, float]
    tokens_per_cell: float
    packs: Packs
    memory: dict[str, float]
    memory_available: float
    largest_pack: int
    ceiling: float
    mfu: float
    steps: int | None
    validations: float
    seconds: float | None
    device_hours: float | None
    checkpoint_bytes: float
    model_bytes: float
    assumptions: tuple[str, ...]


def plan(
    recipe: Recipe,
    device: DeviceName = "h100",
    gpus: int | None = None,
    cells: int | None = None,
    vocabulary: int | None = None,
    mfu: float | None = None,
    json: str | None = None,
) -> None:
    """Print what a run will take: parameters, FLOPs, memory, hours, checkpoints.

    Args:
        recipe: the run.
        device: GPU that it is planned for; `cpu` is this machine, whose speed is measured.
        gpus: Number of them, over all nodes; the recipe's own unless given, or 1 where it says `auto`.
        cells: Number of cells, instead of that of the recipe's shards.
        vocabulary: Tokens of the vocabulary where there are no shards; 60,697 (the published scGPT) unless given.
        mfu: Share of the ceiling that a run reaches, e.g. 0.38; measured on the CPU, assumed on a GPU.
        json: File that also receives the plan.
    """
    from scfm.plan_report import show, write

    planned = plan_of(recipe, device, gpus, cells, vocabulary, mfu)
    show(planned)
    if json is not None:
        write(planned, Path(json))


def plan_of(
    recipe: Recipe,
    device: DeviceName = "h100",
    gpus: int | None = None,
    cells: int | None = None,
    vocabulary: int | None = None,
    mfu: float | None = None,
) -> Plan:
    """Plan a run; arguments as those of `plan`. Raises ScfmError for a recipe or an argument that cannot work."""
    check(recipe)
    if recipe.model.name == "scbert":
        raise ScfmError(
            "model.name: scbert is not planned yet; `scfm bench train` times its steps on the machine at hand"
        )
    for name, number in (("gpus", gpus), ("cells", cells), ("vocabulary", vocabulary)):
        if number is not None and number < 1:
            raise ScfmError(f"--{name}: {number} must be at least 1")
    if mfu is not None and not 0 < mfu <= 1:
        raise ScfmError(f"--mfu: {mfu} must be a share above 0 and at most 1, e.g. 0.38 for 38 %")
    if recipe.task is not None and recipe.task.name == "integration":
        from scfm.tasks.integration import with_batch

        recipe = with_batch(recipe, recipe.task)
    devices = gpus or devices_of(recipe)
    known = cells_of(recipe, cells, vocabulary)
    objectives, assumed = objectives_of(recipe, known)
    with torch.device("meta"):
        network = network_of(recipe, known, objectives)

    memory_of_step = step_memory(recipe, network, known, objectives, "cpu" if device == "cpu" else "cuda")
    available = free_memory() if device == "cpu" else DEVICES[device].memory
    largest = largest_pack(memory_of_step, USABLE * available, int(known.lengths.max()))
    recipe, guessed = with_packs(recipe, known, largest, devices)
    packs = packs_of(recipe, known, devices)
    memory = memory_of_step(packs.tokens, packs.rounds > 1)
    speed = speed_of(recipe, network, known, packs, objectives, device, mfu)
    valid = round((known.count or 0) * recipe.data.valid_fraction)
    steps, validations = schedule_of(recipe, None if known.count is None else known.count - valid)
    validations = validations if valid and recipe.trainer.limit_val_batches != 0 else 0.0

    starts = [0, *(objective.start_step for objective in objectives)]
    cell = mean_work(recipe, known, 1000)
    per_cell = [training_flops(network, objectives, cell, step) / 1000 for step in (0, max(starts))]
    seconds = None
    if steps is not None:
        flops = run_flops(recipe, network, known, packs, objectives, steps)
        flops += validations * valid * per_cell[1] / 3  # forward only
        together = 1 if device == "cpu" else devices  # processes on one machine share its cores
        seconds = flops / (speed.mfu * speed.ceiling * together) + steps * speed.optimizer_seconds
    weights, trained = parameters_of(network)["total"], parameters_of(network)["trained"]
    width = Precision.of(recipe.trainer.precision).weights
    return Plan(
        device=device,
        devices=devices,
        parameters=parameters_of(network),
        flops_per_cell=(per_cell[0], per_cell[1]),
        tokens_per_cell=known.tokens_per_cell,
        packs=packs,
        memory=asdict(memory) | {"total": memory.total},
        memory_available=available,
        largest_pack=largest,
        ceiling=speed.ceiling,
        mfu=speed.mfu,
        steps=steps,
        validations=validations,
        seconds=seconds,
        device_hours=None if seconds is None else seconds * (1 if device == "cpu" else devices) / 3600,
        checkpoint_bytes=width * (weights + ADAM_STATES * trained),
        model_bytes=width * weights,
        assumptions=(*known.said, *assumed, *guessed, speed.said, *([HEAP] if device == "cpu" else [])),
    )


def devices_of(recipe: Recipe) -> int:
    """Return the number of devices that a recipe names, 1 for `auto`."""
    named = recipe.trainer.devices
    here = len(named) if isinstance(named, list) else int(named) if str(named).isdigit() else 1
    return max(here, 1) * recipe.trainer.num_nodes


def objectives_of(recipe: Recipe, cells: Cells) -> tuple[list[Objective], list[str]]:
    """Return the objectives, and what had to be assumed of the classes that they predict."""
    task = recipe.task or TaskConfig()
    asked = {name: cells.obs.get(name, []) for name in (*recipe.cell_conditions, task.label)}
    absent = [name for name, values in asked.items() if len(values) < 2]
    values = {name: ["a", "b"] if name in absent else found for name, found in asked.items()}
    objectives = build_objectives(
        recipe.objectives, n_bins=recipe.data.n_bins, labels=values[task.label], categories=values
    )
    used = {*recipe.cell_conditions, *([task.label] if any(o.name == "cls" for o in objectives) else [])}
    said = [f"obs {name}: assumed, two values" for name in absent if name in used]
    return objectives, [*said, *(f"gene condition {name}: assumed, two values" for name in recipe.data.gene_conditions)]


def network_of(recipe: Recipe, cells: Cells, objectives: Sequence[Objective]) -> nn.Module:
    """Build the recipe's model with the parameters that it trains."""
    from scfm.training.run import choose_trainable

    if recipe.model.name not in MODELS:
        raise ScfmError(f"model.name: {recipe.model.name!r} is not known; choose one of {sorted(MODELS)}")
    network = MODELS[recipe.model.name](
        recipe.model,
        n_tokens=cells.vocabulary,
        pad=0,
        n_bins=recipe.data.n_bins,
        cell_conditions={name: max(len(cells.obs.get(name, [])), 2) for name in recipe.cell_conditions},
        gene_conditions=dict.fromkeys(recipe.data.gene_conditions, 2),
        heads=list({head.task: head for objective in objectives for head in objective.heads()}.values()),
    )
    choose_trainable(network, recipe)
    return network


def parameters_of(network: nn.Module) -> dict[str, int]:
    """Count the weights by part."""
    model: Any = network
    total = count(network.parameters())
    parts = {
        "gene_embedding": count(model.backbone.gene_embedding.parameters()),
        "blocks": count(model.backbone.blocks.parameters()),
        "heads": count(model.heads.parameters()),
    }
    trained = count(p for p in network.parameters() if p.requires_grad)
    return {**parts, "rest": total - sum(parts.values()), "total": total, "trained": trained}


def count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


def run_flops(
    recipe: Recipe, network: nn.Module, cells: Cells, packs: Packs, objectives: Sequence[Objective], steps: int
) -> float:
    """Return the FLOPs of all optimizer steps, the filling of packs included; objectives count from their start on."""
    batch = mean_work(recipe, cells, recipe.data.cells_per_batch)
    batch = batch + Work(tokens=packs.filling, pairs=2 * packs.filling)  # of a pseudo-cell, only one token is known
    starts = sorted({0, *(min(objective.start_step, steps) for objective in objectives), steps})
    return sum((end - start) * training_flops(network, objectives, batch, start) for start, end in pairwise(starts))


def step_memory(
    recipe: Recipe, network: nn.Module, cells: Cells, objectives: Sequence[Objective], kind: Literal["cpu", "cuda"]
) -> Callable[[int, bool], Memory]:
    """Return what a step takes on a kind of device, from the tokens of a pack and whether a step has several."""
    # flash kernels take 16 bits, and heads of a multiple of 8
    odd = product_type(recipe.trainer.precision) == torch.float32 or recipe.model.width // recipe.model.heads % 8 > 0
    slow = kind == "cuda" and odd
    auto = recipe.model.backend == "auto"
    dense = recipe.model.backend == "dense" or (auto and slow) or recipe.model.attention_dropout > 0
    at = Place(
        Precision.of(recipe.trainer.precision),
        0 if kind == "cpu" else 1,
        dense,
        int(cells.lengths.max()),
        recipe.trainer.gradient_checkpointing,
    )
    views = max((objective.views for objective in objectives if objective.scope == "global"), default=1)
    passes = views + sum(objective.needs_second_pass for objective in objectives)

    def memory(tokens: int, several: bool) -> Memory:
        pack = mean_work(recipe, cells, tokens / cells.tokens_per_cell)
        return memory_of(network, recipe.model, replace(pack, tokens=tokens), passes, several, at)

    return memory


def largest_pack(memory: Callable[[int, bool], Memory], budget: float, longest: int) -> int:
    """Return the largest `tokens_per_pack` whose step fits into a budget of bytes, 0 where a cell does not fit."""
    low, high = 0, 2**14  # in units of 1024 tokens
    while low < high:
        middle = (low + high + 1) // 2
        fits = memory(1024 * middle, True).total <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return 1024 * low if 1024 * low >= longest else 0


def with_packs(recipe: Recipe, cells: Cells, largest: int, devices: int) -> tuple[Recipe, list[str]]:
    """Return a recipe whose `tokens_per_pack: auto` is a number, and what is said of it. Raises ScfmError for none."""
    if recipe.data.tokens_per_pack != "auto":
        return recipe, []
    if largest == 0:
        raise ScfmError("data.tokens_per_pack: auto finds none, for not even the longest cell fits into the memory")
    share = -(-recipe.data.cells_per_batch // devices) * int(cells.lengths.max())
    tokens = min(largest, share)
    said = f"data.tokens_per_pack: auto, {tokens:,} by the memory model; a run measures what its devices hold"
    return replace(recipe, data=replace(recipe.data, tokens_per_pack=tokens)), [said]


def speed_of(
    recipe: Recipe,
    network: nn.Module,
    cells: Cells,
    packs: Packs,
    objectives: Sequence[Objective],
    device: DeviceName,
    mfu: float | None,
) -> Speed:
    """Return what a device does in a second: of a GPU assumed, of this CPU measured."""
    if device == "cpu":
        from scfm.rate import measure

        with torch.random.fork_rng():
            rate = measure(recipe, network_of(recipe, cells, objectives), objectives, cells.lengths, packs.tokens)
        said = (
            f"speed: ceiling measured here just now; MFU {rate.mfu:.1%} and {1e3 * rate.optimizer_seconds:.1f} ms per "
            f"optimizer step are the medians of {rate.steps} real training steps on one pack of {rate.tokens:,} tokens"
        )
        if mfu is not None:
            said = "speed: ceiling measured here just now; MFU from --mfu"
        return Speed(rate.ceiling, mfu or rate.mfu, rate.optimizer_seconds, said)
    gpu = DEVICES[device]
    moved = OPTIMIZER_TRAFFIC * Precision.of(recipe.trainer.precision).weights * parameters_of(network)["trained"]
    source = "measured ceiling" if gpu.measured else "datasheet's dense bf16 peak"
    recomputes = recipe.trainer.gradient_checkpointing
    assumed = ASSUMED_MFU * (WITHOUT_RECOMPUTATION if recomputes else 1.0)
    why = f"ASSUMED, not measured: MFU {assumed:.0%}{', blocks recomputed' if recomputes else ''}"
    said = (
        f"speed: {'MFU from --mfu' if mfu else why}, as a share "
        f"of the {source} of {gpu.ceiling / 1e12:,.0f} TFLOP/s; communication and waiting for data are left out"
    )
    if "16" not in str(recipe.trainer.precision):
        said += f"; precision {recipe.trainer.precision} is much slower than bf16, for which the ceiling stands"
    return Speed(gpu.ceiling, mfu or assumed, moved / gpu.bandwidth, said)
