"""How a run stands, judged by the files of its directory alone: from any machine, while it runs or long after.

Nothing here imports torch or Lightning, and nothing is written. A last line that is half written is left out.
"""

from __future__ import annotations

import re
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from scfm.errors import ScfmError
from scfm.metrics_file import hours_of, read_metrics, series
from scfm.recipe import CheckpointConfig
from scfm.redaction import HIDDEN

State = Literal["running", "finished", "stopped", "not started"]
STEP = re.compile(r"step (\d+)/(\d+)  .*eta (\d+):(\d\d):(\d\d)$")
QUIET = 120.0  # seconds without a word that any run may take
REPORTS = 5  # reports that may stay away before a run counts as stopped


@dataclass
class Checkpoint:
    """A saved state of a run: a file, or a folder of a sharded one.

    Attributes:
        name: of the file.
        step: optimizer steps taken; None for the best weights, whose name does not say it.
        age_seconds: since it was written.
        bytes: its size.
    """

    name: str
    step: int | None
    age_seconds: float
    bytes: int


@dataclass
class RunStatus:
    """What the files of a run directory say.

    Attributes:
        run: the directory.
        state: what the run seems to do.
        why: what that is judged by, in words.
        about: the first line of its log: model, cells, devices.
        step, steps: the last step that a file tells of, and how many there will be; None where no file says it.
        eta_seconds: time left, as the last line of the log had it.
        hours: that its steps took so far, validation and saving included.
        speed: the last figures, by name: cells_per_second, step_seconds, data_wait ...
        losses: metric -> (step, value) pairs of the training and validation losses, of probes, and of the best metric.
        baselines: what trivial predictions score, by name.
        best: metric, value and step of the best validation so far; empty before the first.
        guard: counts of what the guard against bad steps did.
        slow_ranks: the lines of the log that name a rank which the others wait for.
        checkpoints: earliest first, the best weights last.
        model: the exported model directory, where there is one.
        go_on: the command that continues the run; empty for a finished one.
        notes: what a reader should know besides.
    """

    run: str
    state: State
    why: str
    about: str = ""
    step: int | None = None
    steps: int | None = None
    eta_seconds: int | None = None
    hours: float | None = None
    speed: dict[str, float] = field(default_factory=dict)
    losses: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    guard: dict[str, float] = field(default_factory=dict)
    slow_ranks: list[str] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    model: str | None = None
    go_on: str = ""
    notes: list[str] = field(default_factory=list)


def read_status(run: Path, now: float | None = None) -> RunStatus:
    """Return how the run of a directory stands.

    Args:
        run: the directory, or a copy of it.
        now: seconds since the epoch; this moment if not given.

    Raises ScfmError where the folder is none of a run.
    """
    now = time.time() if now is None else now
    recipe = recipe_of(run)
    lines = whole_lines(run / "log.txt")
    metrics = read_metrics(run / "metrics.csv")
    by_name = series(metrics)
    speed = {name.removeprefix("speed/"): rows[-1][1] for name, rows in by_name.items() if name.startswith("speed/")}
    saved = checkpoints_of(run / "checkpoints", now)
    reports = [(number, found) for number, line in enumerate(lines) if (found := STEP.match(line))]
    since = lines[reports[-1][0] + 1 :] if reports else lines  # what was said after the last report
    state, why = judged(run, since, by_name, speed, now)
    steps = [step for step, _, _ in metrics] + [c.step for c in saved if c.step is not None]
    steps += [int(found[1]) for _, found in reports[-1:]]
    status = RunStatus(
        run=str(run),
        state=state,
        why=why,
        about=lines[0] if lines else "",
        step=max(steps, default=None),
        hours=hours_of(metrics),
        speed=speed,
        losses={name: rows for name, rows in by_name.items() if is_judged(name)},
        baselines={name: rows[-1][1] for name, rows in by_name.items() if "baseline" in name},
        best=best_of(recipe, by_name),
        guard={name.removeprefix("guard/"): rows[-1][1] for name, rows in by_name.items() if name.startswith("guard/")},
        slow_ranks=[line for line in lines if "slow rank: " in line],
        checkpoints=saved,
        model=str(run / "model") if (run / "model/config.json").is_file() else None,
    )
    if reports:
        _, steps_in_all, hours, minutes, seconds = map(int, reports[-1][1].groups())
        status.steps = steps_in_all
        status.eta_seconds = 3600 * hours + 60 * minutes + seconds if state == "running" else None
    elif recipe.get("trainer", {}).get("max_steps", -1) > 0:
        status.steps = recipe["trainer"]["max_steps"]
    if lost := by_name.get("checkpoint/not_saved"):
        status.notes.append(f"{lost[-1][1]:.0f} checkpoints could not be written; its log says why")
    if state != "finished":
        verb = "finetune" if recipe.get("from") or recipe.get("task") else "pretrain"
        place = shlex.quote(str(run))
        status.go_on = f"scfm {verb} --config {shlex.quote(str(run / 'recipe.yaml'))} --out {place} --resume auto"
        if HIDDEN in str(recipe):
            status.notes.append(f"recipe.yaml has {HIDDEN} in place of secrets: give those keys again to go on")
    return status


def recipe_of(run: Path) -> dict[str, Any]:
    """Return the recipe of a run directory. Raises ScfmError where the folder is none, saying what it is instead."""
    if not run.is_dir():
        what = "is a file" if run.exists() else "there is no such folder"
        raise ScfmError(f"{run}: {what}; give the run directory, the `out` of its recipe")
    file = run / "recipe.yaml"
    if not file.is_file():
        raise ScfmError(f"{run}: is not a run directory (no recipe.yaml){instead(run)}")
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ScfmError(f"{file}: cannot be read as a recipe ({error})") from error
    if not isinstance(recipe, dict):
        raise ScfmError(f"{file}: is empty or no recipe; the run may be starting this very moment")
    return recipe


def instead(folder: Path) -> str:
    """Say which run could be meant by a folder that is none."""
    if (folder / "config.json").is_file() and (folder.parent / "recipe.yaml").is_file():
        return f"; it is the model of the run {folder.parent}"
    runs = sorted(path.parent.name for path in folder.glob("*/recipe.yaml"))
    return f"; it holds the runs {', '.join(runs[:8])}{' ...' if len(runs) > 8 else ''}: name one" if runs else ""


def whole_lines(path: Path) -> list[str]:
    """Return the lines of a text file that are written to their end."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return text[: text.rfind("\n") + 1].splitlines()


def judged(
    run: Path, since: list[str], by_name: dict[str, list[tuple[int, float]]], speed: dict[str, float], now: float
) -> tuple[State, str]:
    """Return what a run seems to do, and what that is judged by."""
    if any(line.startswith("model: ") for line in since):
        early = [line for line in since if line.startswith("ended early")]
        return "finished", "; ".join(["its log ends with the model", *early])
    watched = [run / "recipe.yaml", run / "log.txt", run / "metrics.csv", *(run / "checkpoints").glob("*")]
    age = max(now - max(path.stat().st_mtime for path in watched if path.exists()), 0.0)
    asked = [line for line in since if "--resume auto" in line]
    if asked:
        return "stopped", f"its log says: {asked[-1]}"
    reported = [step for step, _ in by_name.get("speed/step_seconds", [])]
    every = speed["step_seconds"] * (reported[-1] - ([0, *reported])[-2]) if reported else None
    beside = sum(
        max((value for _, value in by_name.get(f"speed/{what}_seconds", [])), default=0.0)
        for what in ("validation", "checkpoint")
    )
    last = f"last written {spoken(age)} ago"
    due = f", reports come about every {spoken(every)}" if every is not None else ""
    if age <= max(QUIET, REPORTS * (every or QUIET) + 2 * beside):
        return "running", f"as far as its files say: {last}{due}"
    if not by_name and not since:
        return "not started", f"it has a recipe and no log; {last}"
    return "stopped", f"as far as its files say: {last}{due}; killed, or its machine is gone"


def is_judged(name: str) -> bool:
    """Say whether a metric tells how well the model does, rather than how fast or by which rate it learns."""
    beside = name == "train/learning_rate" or "baseline" in name
    return name.startswith(("train/", "valid/", "probe/")) and not beside


def best_of(recipe: dict[str, Any], by_name: dict[str, list[tuple[int, float]]]) -> dict[str, Any]:
    """Return metric, value and step of the best validation, of which the weights are kept; empty before the first."""
    config = CheckpointConfig(best=recipe.get("checkpoint", {}).get("best", CheckpointConfig().best))
    sign = -1 if config.mode == "max" else 1
    rows = [(sign * value, step) for step, value in by_name.get(config.best, [])]
    if not rows:
        return {}
    value, step = min(rows)
    return {"metric": config.best, "value": sign * value, "step": step}


def checkpoints_of(folder: Path, now: float) -> list[Checkpoint]:
    """Return the checkpoints of a run; one that vanishes meanwhile, as older ones do, is left out."""
    found = []
    for path in [*folder.glob("step=*.ckpt"), *folder.glob("best.ckpt")]:
        number = path.stem.removeprefix("step=")
        try:
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            size = sum(file.stat().st_size for file in files)
            age = max(now - path.stat().st_mtime, 0.0)
        except FileNotFoundError:
            continue
        found.append(Checkpoint(path.name, int(number) if number.isdigit() else None, age, size))
    return sorted(found, key=lambda checkpoint: (checkpoint.step is None, checkpoint.step))


def spoken(seconds: float) -> str:
    """Return a time in its largest units: 12 s, 3 min, 5 h 20 min, 4 days."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} days"
