"""The run directory: everything a run leaves behind, in one place.

recipe.yaml  metrics.csv  log.txt  checkpoints/  plots/  model/  README.md
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from scfm.errors import ScfmError
from scfm.recipe import Recipe
from scfm.training.checkpointing import checkpoints, step_of


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run, and the checkpoint it continues from."""

    path: Path
    resume_from: Path | None

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
    def resume_step(self) -> int | None:
        """Optimizer steps taken at the checkpoint that the run continues from."""
        return step_of(self.resume_from) if self.resume_from else None


def open_run(recipe: Recipe, resume: str | None) -> RunDirectory:
    """Create the run directory of a recipe, or find where to continue in it.

    Args:
        recipe: its `out` is the directory; the resolved recipe is written there.
        resume: `auto` continues from the newest checkpoint where there is one; a path continues from that checkpoint;
            None starts afresh and refuses a directory that holds anything.

    Raises:
        ScfmError: the directory holds something else, or the checkpoint does not exist.
    """
    path = Path(recipe.out)
    run = RunDirectory(path, None)
    if resume not in (None, "auto"):
        checkpoint = Path(str(resume))
        if not checkpoint.is_file():
            raise ScfmError(f"--resume {resume}: no such checkpoint; `--resume auto` finds the newest one of the run")
        run = RunDirectory(path, checkpoint)
    elif resume == "auto":
        run = RunDirectory(path, next(reversed(checkpoints(run.checkpoints)), None))
    if not is_main_process():
        return run
    if path.exists() and any(path.iterdir()):
        if not (path / "recipe.yaml").exists():
            raise ScfmError(f"{path}: holds something that is not a run and is left as it is; choose another --out")
        if resume is None:
            raise ScfmError(f"{path}: already holds a run; --resume auto continues it, or choose another --out")
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    run.plots.mkdir(exist_ok=True)
    recipe.save(path / "recipe.yaml")
    return run


def is_main_process() -> bool:
    """Say whether this process writes the run directory; true of one of all ranks, also before they have met."""
    return getattr(rank_zero_only, "rank", 0) == 0
