"""The runs of a study: each a function of its resolved recipe, made once, by whichever process comes first.

OUT/runs/KEY/   one run, KEY the hash of all that it depends on
  lock          held while a process makes it
  result.json   its scores; a run that has one is never made again
  log.txt       what it printed
  work/         recipe.yaml, metrics.csv ... of the training run; its weights go once they are scored
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scfm.checkpoints.native import read_model
from scfm.checkpoints.record import digest
from scfm.data.building.directory import locked, read_json, write_json
from scfm.data.building.workers import available_cores
from scfm.errors import ScfmError
from scfm.evaluation import asked
from scfm.evaluation.harness import run_method
from scfm.evaluation.protocol import EvaluationProtocol, Kind, LabelledCells, Method, ModelInput
from scfm.evaluation.protocols import protocol_of
from scfm.evaluation.provenance import commit, data_hash
from scfm.evaluation.splits import Split, stratified_split
from scfm.evaluation.study_design import Configuration, Factor, StudyRecipe, configurations_of, read_study, recipe_file

RESULT = "result.json"
WEIGHTS = ("checkpoints", "model")
OF_A_RUN = ("out", "from", "seed", "wandb")  # keys of a recipe that do not belong to a configuration


@dataclass(frozen=True)
class Question:
    """What a study is asked: everything that processes need to come to the same plan.

    Attributes:
        config: the recipe of the study.
        model: model directory.
        data: h5ad files.
        out: folder of the study.
        label, batch, donor: obs columns, as `scfm evaluate` has them.
        reference: h5ad file to learn from, and to choose on; the data are then what the chosen one is judged on.
        split, held_out: what is held out, as `scfm evaluate` has it.
    """

    config: str
    model: str
    data: tuple[str, ...]
    out: str
    label: str
    batch: str | None = None
    donor: str | None = None
    reference: str | None = None
    split: str = "random"
    held_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlannedRun:
    """One method on one seed: `configuration` is an index, None for a baseline."""

    name: str
    kind: Kind
    seed: int
    configuration: int | None
    key: str


@dataclass(frozen=True)
class Plan:
    """All that a study will do.

    Attributes:
        cells: of the whole study.
        outer: `train` are the cells to choose on, `test` those that only what was chosen is judged on.
        tuning: the cells to choose on; the others are not among them.
        splits: of the tuning cells, one per seed: to train on, and to choose by.
        labels: the fixed label list of the tuning cells.
    """

    question: Question
    study: StudyRecipe
    protocol: EvaluationProtocol
    cells: LabelledCells
    outer: Split
    tuning: LabelledCells
    splits: list[Split]
    labels: list[str]
    factors: list[Factor]
    configurations: list[Configuration]
    runs: list[PlannedRun]

    @property
    def folder(self) -> Path:
        """Where the study is written."""
        return Path(self.question.out)

    def place(self, run: PlannedRun) -> Path:
        """Return the folder of a run."""
        return self.folder / "runs" / run.key

    def result(self, run: PlannedRun) -> dict[str, Any] | None:
        """Return what a run came to, None where it is not finished."""
        path = self.place(run) / RESULT
        return read_json(path) if path.exists() else None

    def pending(self) -> list[PlannedRun]:
        """Return the runs that are not finished."""
        return [run for run in self.runs if not (self.place(run) / RESULT).exists()]

    def method(self, run: PlannedRun) -> Method:
        """Return what a run fits."""
        if run.configuration is None:
            return next(one for one in self.protocol.baselines() if one.name == run.name)
        return self.model(self.configurations[run.configuration], run.name, self.place(run) / "work")

    def model(self, configuration: Configuration, name: str, runs: Path) -> Method:
        """Return the model, to be fine-tuned by a configuration, as a method of the task."""
        recipe = {key: value for key, value in configuration.recipe.to_dict().items() if key not in OF_A_RUN}
        return self.protocol.model(ModelInput(Path(self.question.model), name, runs, recipe["task"]["setting"], recipe))


def plan_of(question: Question) -> Plan:
    """Read cells, model and recipe, and say what will be done; the same in every process.

    Raises ScfmError for what cannot be studied.
    """
    study = read_study(recipe_file(question.config))
    protocol = protocol_of(study.task)
    if question.reference is not None and question.split != "random":
        raise ScfmError("--reference and --split each say what is held out; give one of them")
    adata = asked.read_cells(question.data, question.label)
    outer = None
    if question.reference is not None:
        if protocol.transductive:
            raise ScfmError(f"--reference: {study.task} is transductive; give all files as --data")
        known = asked.read_cells([question.reference], question.label)
        adata, (outer,) = asked.across(known, adata, question.label, 1)
    if protocol.needs_batch and question.batch is None:
        raise ScfmError(f"{protocol.name}: names no batch column; give --batch")
    cells = LabelledCells(adata, question.label, question.batch, asked.donor_column(adata, question.donor))
    outer = outer or outer_split(protocol, cells, question)
    tuning = LabelledCells(adata[outer.train].copy(), cells.label, cells.batch, cells.donor)
    splits = inner_splits(protocol, tuning, question.split, study.seeds)
    held_out = np.concatenate([split.test for split in splits])
    files = read_model(question.model)
    factors, configurations = configurations_of(study, files, question.label, protocol.settings)
    data, weights = data_hash(tuning.adata, tuning.label), model_hash(Path(question.model))
    names = tuning.adata.obs_names.tolist()
    runs = []
    for seed, split in enumerate(splits):
        of_all = {
            "task": study.task,
            "data": data,
            "split": split.hash(names),
            "seed": split.seed,
            "batch": cells.batch,
        }
        for k, one in enumerate(configurations):
            if one.reason is None:
                recipe = {key: value for key, value in one.recipe.to_dict().items() if key not in OF_A_RUN}
                runs.append(
                    PlannedRun(one.name, "model", seed, k, key_of(of_all | {"model": weights, "recipe": recipe}))
                )
        for baseline in protocol.baselines():
            asks = {"baseline": baseline.name, "what": baseline.describe(), "label": tuning.label}
            runs.append(PlannedRun(baseline.name, "baseline", seed, None, key_of(of_all | asks)))
    return Plan(
        question,
        study,
        protocol,
        cells,
        outer,
        tuning,
        splits,
        sorted(set(tuning.truth[held_out].tolist())),
        factors,
        configurations,
        runs,
    )


def outer_split(protocol: EvaluationProtocol, cells: LabelledCells, question: Question) -> Split:
    """Return which cells serve to choose, and which only to judge what was chosen: drawn once, for all seeds.

    Of a transductive task two halves: each configuration sees all cells of one, the chosen one all cells of the other.
    """
    if protocol.transductive:
        if question.split != "random" or question.held_out:
            raise ScfmError(
                f"--split: {protocol.name} is transductive; a random half of the cells judges what was chosen"
            )
        return stratified_split(cells.truth, 0.5, 0)
    return asked.splits_of(protocol, cells, question.split, question.held_out, 1)[0]


def inner_splits(protocol: EvaluationProtocol, tuning: LabelledCells, split: str, seeds: int) -> list[Split]:
    """Return for every seed which tuning cells train and which validate: by groups where two of them are left."""
    if split != "random":
        column = asked.column_of(tuning.adata, split, tuning)
        split = split if tuning.adata.obs[column].nunique() > 1 else "random"
    return asked.splits_of(protocol, tuning, split, (), seeds)


def model_hash(model: Path) -> str:
    """Return a hash of a model directory's weights, configuration and vocabulary."""
    return key_of({name: digest(model / name) for name in ("config.json", "model.safetensors", "vocab.json")})


def key_of(asks: dict[str, Any]) -> str:
    """Return the hash of all that a run depends on, as the name of its folder."""
    return hashlib.sha256(json.dumps(asks, sort_keys=True).encode()).hexdigest()[:20]


def share_of(part: str | None) -> tuple[int, int]:
    """Return I and N of I/N, 1 and 1 where none is given. Raises ScfmError for anything else."""
    numbers = (part or "1/1").split("/")
    if len(numbers) != 2 or not all(one.isdecimal() for one in numbers) or not 1 <= int(numbers[0]) <= int(numbers[1]):
        raise ScfmError(f"--part {part}: write I/N, the I-th of N parts, such as 1/8 to 8/8")
    return int(numbers[0]), int(numbers[1])


def forget_failures(plan: Plan) -> None:
    """Remove the results of runs that failed, so that they are made again."""
    for run in plan.runs:
        if (result := plan.result(run)) is not None and result["failure"]:
            (plan.place(run) / RESULT).unlink()


def make(plan: Plan, part: str | None, workers: int) -> int:
    """Make the runs of a part that are not finished, in so many processes; return how many were made.

    Raises ScfmError where a process was killed; what is finished is kept.
    """
    before = len(plan.pending())
    if workers == 1 or before < 2:
        make_runs(plan, part)
        return before - len(plan.pending())
    context = multiprocessing.get_context("spawn")
    crew = [context.Process(target=work, args=(plan.question, part, workers)) for _ in range(min(workers, before))]
    for process in crew:
        process.start()
    for process in crew:
        process.join()
    if lost := sum(process.exitcode != 0 for process in crew):
        raise ScfmError(
            f"{lost} of {len(crew)} processes ended early (killed, or out of memory); {len(plan.pending()):,} runs are "
            "left: the same command goes on with them, with fewer --workers if memory was short"
        )
    return before - len(plan.pending())


def work(question: Question, part: str | None, workers: int) -> None:
    """Be one of several processes: take whichever run nobody has."""
    import torch

    torch.set_num_threads(max(1, available_cores() // workers))
    make_runs(plan_of(question), part)


def make_runs(plan: Plan, part: str | None) -> None:
    """Make the runs of a part that are neither finished nor under way in another process."""
    mine, parts = share_of(part)
    for k, run in enumerate(plan.runs):
        place = plan.place(run)
        if k % parts != mine - 1 or (place / RESULT).exists():
            continue
        with ExitStack() as held:
            try:
                held.enter_context(locked(place, "lock", "making a run in"))
            except ScfmError:
                continue  # another process makes it
            if not (place / RESULT).exists():
                make_run(plan, run)


def make_run(plan: Plan, run: PlannedRun) -> None:
    """Fit and score one method on one seed, and write its result; what it raises becomes the reason of its failure."""
    place, split = plan.place(run), plan.splits[run.seed]
    shutil.rmtree(place / "work", ignore_errors=True)  # of a process that was killed
    method = plan.method(run)
    print(f"seed {run.seed}: {run.name}", flush=True)
    with (place / "log.txt").open("w", encoding="utf-8") as log, redirect_stdout(log):
        done = run_method(plan.protocol, method, run.kind, plan.tuning, split, run.seed, plan.labels, shown=False)
    write_json(
        place / RESULT,
        {
            "method": run.name,
            "kind": run.kind,
            "seed": run.seed,
            "values": {name: None if math.isnan(value) else float(value) for name, value in done.values.items()},
            "failure": done.failure,
            "traceback": done.trace,
            "seconds": round(done.seconds_fit + done.seconds_predict, 3),
            "peak_mib": done.peak_mib,
            "parameters": done.parameters,
            "commit": commit(),
        },
    )
    for folder in sorted(place.glob("work/*")):
        for name in WEIGHTS:
            shutil.rmtree(folder / name, ignore_errors=True)


def read_results(plan: Plan, runs: Sequence[PlannedRun]) -> list[dict[str, Any]]:
    """Return the results of finished runs, each with its key and configuration."""
    found = []
    for run in runs:
        result = plan.result(run)
        assert result is not None
        found.append(result | {"method": run.name, "configuration": run.configuration, "key": run.key})
    return found
