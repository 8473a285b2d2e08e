"""What a run writes while it goes: metrics.csv, one dense progress line, checkpoints."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from scfm.data.batch import PackedBatch
from scfm.errors import ScfmError
from scfm.recipe import CheckpointConfig
from scfm.training.module import FoundationModule, Metrics, add
from scfm.training.throughput import Throughput

METRICS_HEADER = ["step", "metric", "value"]


class MetricsCsv(Logger):
    """Appends every logged metric to metrics.csv, one row per value: step, metric, value.

    Args:
        path: the file; kept when a run is resumed.
        resume_step: rows beyond this step are dropped first, for the resumed run writes them again.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        super().__init__()
        self.path = path
        self.resume_step = resume_step
        self.started = False

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The resolved recipe is saved as recipe.yaml; nothing is repeated here."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if not self.started:
            self.start()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            rows = ([step, name, repr(float(value))] for name, value in metrics.items() if name != "epoch")
            csv.writer(file).writerows(rows)

    def start(self) -> None:
        """Write the header, and what a resumed run keeps."""
        kept = [] if self.resume_step is None else read_metrics(self.path)
        written = self.path.with_suffix(".tmp")
        with written.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(METRICS_HEADER)
            writer.writerows(row for row in kept if row[0] <= (self.resume_step or 0))
        written.replace(self.path)
        self.started = True


def read_metrics(path: Path) -> list[tuple[int, str, float]]:
    """Return the rows of a metrics.csv as (step, metric, value); a row cut short by a kill is left out."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    return [(int(row[0]), row[1], float(row[2])) for row in rows if len(row) == 3 and row[2]]


class Progress(L.Callback):
    """Prints and logs one line every few steps: step, loss parts, rate, throughput, time left.

    Args:
        log: text file that receives the same lines.
        every: optimizer steps between two lines.
        throughput: counts the steps; stands before this one among the callbacks.
    """

    def __init__(self, log: Path, every: int, throughput: Throughput) -> None:
        self.log_file, self.every, self.throughput = log, every, throughput
        self.reset()

    def reset(self) -> None:
        self.sums: Metrics = {}
        self.steps = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.first_step, self.started = trainer.global_step, time.perf_counter()
        self.total = int(trainer.estimated_stepping_batches)
        self.reset()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: list[PackedBatch], batch_idx: int
    ) -> None:
        assert isinstance(pl_module, FoundationModule)
        add(self.sums, pl_module.step_metrics)
        self.steps += 1
        if trainer.global_step % self.every == 0 or trainer.global_step >= self.total:
            self.report(trainer, pl_module)

    def report(self, trainer: L.Trainer, module: FoundationModule) -> None:
        """Average since the last line, over ranks and steps; the only place that waits for the device."""
        metrics = {name: float(value) / self.steps for name, value in module.sum_over_ranks(self.sums).items()}
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        speed = self.throughput.figures(trainer, module)
        logged = {f"train/{k}": v for k, v in metrics.items()} | {"train/learning_rate": rate}
        for logger in trainer.loggers:
            # a name of their own for speeds: all else is equal in two runs of one recipe
            logger.log_metrics(logged | {f"speed/{k}": v for k, v in speed.items()}, step=trainer.global_step)
        pace = (time.perf_counter() - self.started) / (trainer.global_step - self.first_step)
        share = f" ({speed['mfu']:.0%} MFU)" if "mfu" in speed else ""
        parts = "  ".join(f"{name} {metrics[name]:.4g}" for name in sorted(metrics, key=lambda n: n != "loss"))
        self.say(
            trainer,
            f"step {trainer.global_step}/{self.total}  {parts}  lr {rate:.2g}  "
            f"{speed['cells_per_second']:,.0f} cells/s  {speed['tokens_per_second']:,.0f} tokens/s  "
            f"{speed['tflops']:.3g} TFLOP/s{share}  wait {speed['data_wait']:.1%}  empty {speed['empty']:.1%}  "
            f"eta {clock(pace * (self.total - trainer.global_step))}",
        )
        self.reset()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("valid/")}
        if found and not trainer.sanity_checking:
            for logger in trainer.loggers:
                logger.log_metrics(found, step=trainer.global_step)
            self.say(trainer, f"step {trainer.global_step}  " + "  ".join(f"{k} {v:.4g}" for k, v in found.items()))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        judge = trainer.early_stopping_callback
        if isinstance(judge, Patience) and judge.reason and trainer.global_step < self.total:
            self.say(trainer, f"ended early: {judge.reason}")

    def say(self, trainer: L.Trainer, line: str) -> None:
        if trainer.is_global_zero:
            print(line, flush=True)
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def clock(seconds: float) -> str:
    """Return seconds as h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


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
