"""The run directory: everything a run leaves behind, in one place.

recipe.yaml  metrics.csv  log.txt  checkpoints/  plots/  model/  README.md  finished.yaml (the recipe, at the end)
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from scfm.errors import ScfmError
from scfm.recipe import Recipe
from scfm.redaction import without_secrets
from scfm.training.restarts import restarts
from scfm.training.saving import checkpoints, drop_unfinished, step_of


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run, and the checkpoint it continues from.

    Attributes:
        path: the directory.
        resume_from: None where the run starts afresh.
        is_finished: whether it has ended with the recipe that it is started with again, so that nothing is left to do.
    """

    path: Path
    resume_from: Path | None
    is_finished: bool = False

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def card(self) -> Path:
        return self.path / "README.md"

    @property
    def finished(self) -> Path:
        return self.path / "finished.yaml"

    @property
    def resume_step(self) -> int | None:
        """Optimizer steps taken at the checkpoint that the run continues from."""
        return step_of(self.resume_from) if self.resume_from else None

    def finish(self) -> None:
        """Note that nothing is left to do for this recipe."""
        shutil.copyfile(self.path / "recipe.yaml", self.finished)


def open_run(recipe: Recipe, resume: str | None) -> RunDirectory:
    """Create the run directory of a recipe, or find where to continue in it.

    Args:
        recipe: its `out` is the directory; the resolved recipe is written there.
        resume: `auto` continues from the newest checkpoint where there is one, and leaves a finished run as it is; a
            path continues from that checkpoint; None starts afresh and refuses a directory that holds anything, but
            for processes that torchrun has started again, for which it is `auto`.

    Raises:
        ScfmError: the directory holds something else, or the checkpoint does not exist.
    """
    path = Path(recipe.out)
    run = RunDirectory(path, None)
    if resume is None and restarts():
        resume = "auto"
    if resume not in (None, "auto"):
        checkpoint = Path(str(resume))
        if not checkpoint.is_file():
            raise ScfmError(f"--resume {resume}: no such checkpoint; `--resume auto` finds the newest one of the run")
        run = RunDirectory(path, checkpoint)
    elif resume == "auto":
        # what a run leaves at its end says whether it is over; recipe.yaml may be written by another process just now
        saved = yaml.safe_load(run.finished.read_text(encoding="utf-8")) if run.finished.exists() else None
        over = saved == without_secrets(recipe.to_dict())
        run = RunDirectory(path, next(reversed(checkpoints(run.checkpoints)), None), over)
    if not is_main_process() or run.is_finished:
        return run
    if path.exists() and any(path.iterdir()):
        if not (path / "recipe.yaml").exists():
            raise ScfmError(f"{path}: holds something that is not a run and is left as it is; choose another --out")
        if resume is None:
            raise ScfmError(f"{path}: already holds a run; --resume auto continues it, or choose another --out")
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    run.plots.mkdir(exist_ok=True)
    drop_unfinished(run.checkpoints)
    run.finished.unlink(missing_ok=True)
    recipe.save(path / "recipe.yaml")
    return run


def is_main_process() -> bool:
    """Say whether this process writes the run directory; true of one of all ranks, also before they have met."""
    return getattr(rank_zero_only, "rank", 0) == 0
