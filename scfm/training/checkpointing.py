"""When a run is saved and judged: resumable checkpoints, the best weights, the last validation, an early end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from scfm.data.batch import PackedBatch
from scfm.errors import RunStopped, ScfmError
from scfm.recipe import CheckpointConfig
from scfm.training.guard import Guard
from scfm.training.saving import BackgroundCheckpoints, checkpoints
from scfm.training.stopping import Word
from scfm.training.together import Together

Say = Callable[[str], None]


class NewestCheckpoints(L.Callback):
    """Saves the whole state of a run every so many steps and minutes, and when the run is asked to stop.

    It saves just before the next step begins, after any validation between the two, so that a resumed run repeats or
    skips neither. Rank 0's clock counts the minutes for all processes.

    Args:
        files: writes `step=<n>.ckpt` files.
        config: the recipe's checkpoint section.
        together: the other processes, with whom the step is agreed on.
        guard: asked whether the weights are worth keeping.
        say: prints a line and logs it, in the process that logs.
    """

    def __init__(
        self, files: BackgroundCheckpoints, config: CheckpointConfig, together: Together, guard: Guard, say: Say
    ) -> None:
        self.files, self.config, self.together, self.guard, self.say = files, config, together, guard, say

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.saved_at, self.looked_at = trainer.global_step, time.monotonic()  # what was resumed from is saved

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: list[PackedBatch], batch_idx: int
    ) -> None:
        self.report(trainer)
        step, minutes = trainer.global_step, self.config.every_minutes
        is_time = trainer.is_global_zero and 0 < minutes * 60 <= time.monotonic() - self.looked_at
        asked = self.together.signals.asked is not None
        agreed = self.together.agreement.reach(Word(stop=asked, save=is_time))
        if agreed.stop:
            self.stop(trainer)
        elif agreed.save or step % self.config.every_steps == 0:
            self.save(trainer)

    def save(self, trainer: L.Trainer, however: bool = False) -> None:
        """Save a state unless it is saved already, or the last updates were left out (but then `however` saves it)."""
        self.looked_at = time.monotonic()
        if trainer.global_step == self.saved_at:
            return
        self.guard.look(trainer)
        if self.guard.in_a_row and not however:
            self.say(
                f"step {trainer.global_step}: no checkpoint, for the last {self.guard.in_a_row} updates were left out; "
                "the one before them stays"
            )
            return
        trainer.save_checkpoint(self.files.folder / f"step={trainer.global_step:09d}.ckpt")
        self.saved_at = trainer.global_step

    def stop(self, trainer: L.Trainer) -> None:
        """Save, wait until the files are written, and leave the run. Raises RunStopped, in all processes."""
        self.save(trainer, however=True)
        self.files.wait()
        self.report(trainer)
        asked = f"asked to stop ({self.together.signals.asked or 'by another process'})"
        kept = checkpoints(self.files.folder)
        where = f"saved as {kept[-1]}" if kept else "nothing to save yet"
        message = f"step {trainer.global_step}: {asked}, {where}; continue with --resume auto"
        self.say(message)
        self.together.part(trainer)
        raise RunStopped(message, self.together.exit_code(trainer))

    def report(self, trainer: L.Trainer) -> None:
        """Say what the writing thread has found."""
        for line in self.files.news:
            self.say(line)
            for logger in trainer.loggers:
                logger.log_metrics({"checkpoint/not_saved": float(self.files.not_saved)}, step=trainer.global_step)
        self.files.news.clear()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.files.finish()
        self.report(trainer)


class FinalValidation(L.Callback):
    """Validates once more where a run ends between two validations, so that the last weights are judged too."""

    def __init__(self) -> None:
        self.validated_at = -1

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validated_at = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.enable_validation and self.validated_at != trainer.global_step:
            loop = trainer.fit_loop.epoch_loop.val_loop
            trainer.validating = True
            loop.run()
            trainer.training = True


class BestWeights(ModelCheckpoint):
    """Keeps the weights of the best validation, in `best.ckpt`.

    Args:
        folder: where the file goes.
        config: the recipe's checkpoint section, which says what is best.
    """

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        super().__init__(
            folder,
            filename="best",
            monitor=config.best,
            mode=config.mode,
            save_top_k=1,
            save_weights_only=True,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        known = sorted(name for name in trainer.callback_metrics if name.startswith(("valid/", "probe/")))
        if self.monitor not in known:
            raise ScfmError(f"checkpoint.best: {self.monitor!r} is not measured; choose one of {', '.join(known)}")
        super().on_validation_end(trainer, pl_module)


class Patience(EarlyStopping):
    """Ends a run after so many validations in a row that are not better than the best.

    A resumed run has waited as long as the checkpoint had, with the patience of its own recipe.

    Args:
        config: the recipe's checkpoint section.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        # BestWeights refuses a metric that is not there
        super().__init__(
            config.best, patience=config.patience, mode=config.mode, strict=False, check_on_train_epoch_end=False
        )

    @property
    def reason(self) -> str:
        """Why the run ended early, in words; empty where it did not."""
        said = {
            EarlyStoppingReason.PATIENCE_EXHAUSTED: f"{self.wait_count} validations in a row were not better than the "
            f"best {self.monitor}, {float(self.best_score):.4g}",
            EarlyStoppingReason.NON_FINITE_METRIC: f"{self.monitor} is not finite",
        }
        return said.get(self.stopping_reason, "")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"patience": self.patience})
