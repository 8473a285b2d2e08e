"""When a run is saved and judged: resumable checkpoints, the best weights, the last validation, an early end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from scfm.data.batch import PackedBatch
from scfm.errors import ScfmError
from scfm.recipe import CheckpointConfig


class NewestCheckpoints(L.Callback):
    """Saves the whole state of a run every few steps, and keeps the last of them.

    It saves just before the next step begins, after any validation between the two, so that a resumed run repeats or
    skips neither. Lightning writes under a temporary name and renames.

    Args:
        folder: where `step=<n>.ckpt` files go.
        every: optimizer steps between two of them.
        keep: how many are kept.
    """

    def __init__(self, folder: Path, every: int, keep: int) -> None:
        self.folder, self.every, self.keep = folder, every, keep

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: list[PackedBatch], batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == 0 or step % self.every:
            return
        trainer.save_checkpoint(self.folder / f"step={step:09d}.ckpt")
        if trainer.is_global_zero:
            for old in checkpoints(self.folder)[: -self.keep]:
                old.unlink()


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
        known = sorted(name for name in trainer.callback_metrics if name.startswith("valid/"))
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


def checkpoints(folder: Path) -> list[Path]:
    """Return the resumable checkpoints of a run, earliest step first."""
    return sorted(folder.glob("step=*.ckpt"), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the optimizer steps taken at a checkpoint."""
    return int(checkpoint.stem.removeprefix("step="))
