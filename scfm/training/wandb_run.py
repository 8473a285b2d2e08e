"""The Weights & Biases run of a run directory: online or offline, and the same one after every resume."""

from __future__ import annotations

import secrets
import sys
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment

from scfm.errors import ScfmError
from scfm.recipe import Recipe
from scfm.redaction import redacted, without_secrets
from scfm.training.rundir import RunDirectory, is_main_process

ID_FILE = "wandb-id.txt"


def wandb_loggers(recipe: Recipe, run: RunDirectory) -> list[Logger]:
    """Return the Weights & Biases logger where the recipe names a project.

    The id of its run is kept in RUN/wandb-id.txt, so that a resumed run goes on where it was logged before. Raises
    ScfmError where wandb is to be reached and nobody is logged in.
    """
    config = recipe.wandb
    if not config.project or not is_main_process():
        return []
    import wandb

    expect_login(config.mode)
    kept = run.path / ID_FILE
    if not kept.is_file():
        kept.write_text(f"{secrets.token_hex(4)}\n", encoding="utf-8")
    options: dict[str, Any] = {
        "project": config.project,
        "name": config.name,
        "offline": config.mode == "offline",
        "save_dir": run.path,
        "id": kept.read_text(encoding="utf-8").strip(),
        "resume": "allow",
        # with the run, not by log_hyperparams: wandb must begin in the process that logs, which may be a fork of this
        "config": without_secrets(recipe.to_dict()),
        # wandb notes the command line, unless that may hold a key
        "settings": wandb.Settings(x_disable_meta=any(redacted(word) != word for word in sys.argv)),
    }
    return [OneRun(**options)]


class OneRun(WandbLogger):
    """A wandb run that begins with the first metric and ends with the training, whatever this process does next."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        import wandb

        try:
            return super().experiment
        except wandb.errors.Error as error:
            raise ScfmError(
                f"wandb: the run cannot begin ({error}); train with --wandb.mode offline and send it "
                "later with `wandb sync`"
            ) from error

    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)
            self._experiment = None


def expect_login(mode: str) -> None:
    """Raise ScfmError where wandb is to be reached and has no key: it would ask for one, and a job would hang."""
    import wandb

    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise ScfmError(
            "wandb.mode: online needs a login, and this machine has none; run `wandb login`, set WANDB_API_KEY, or "
            "train with --wandb.mode offline and send it later with `wandb sync`"
        )
