"""What a run says while it goes: metrics.csv and one dense progress line."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from scfm.data.batch import PackedBatch
from scfm.metrics_file import METRICS_HEADER, read_metrics
from scfm.training.checkpointing import Patience
from scfm.training.module import FoundationModule, Metrics, add
from scfm.training.run_log import Lines, RunLog
from scfm.training.stragglers import Stragglers
from scfm.training.throughput import Throughput


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
        self.lines = Lines(path)
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
        rows = io.StringIO(newline="")
        csv.writer(rows).writerows([step, name, repr(float(v))] for name, v in metrics.items() if name != "epoch")
        self.lines.add(rows.getvalue())

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


class Progress(L.Callback):
    """Prints and logs one line every few steps: step, loss parts, rate, throughput, time left.

    Args:
        log: prints the lines and writes them to a file.
        every: optimizer steps between two lines.

    Attributes:
        watchers: this one after those that measure what it tells; to stand after what saves before a step.
    """

    def __init__(self, log: RunLog, every: int) -> None:
        self.run_log, self.every = log, every
        self.throughput, self.stragglers = Throughput(), Stragglers()
        self.watchers: list[L.Callback] = [self.throughput, self.stragglers, self]
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
        waited = self.throughput.data_wait(trainer) - self.throughput.waited
        speed = self.throughput.figures(trainer, module)
        slowest = self.stragglers.slowest(trainer, waited)
        if slowest:
            speed |= {
                "step_seconds_slowest": slowest.seconds,
                "slowest_rank": slowest.rank,
                "slowest_ratio": slowest.ratio,
                "data_wait_slowest": slowest.waiting,
            }
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
            f"{apart(speed)}eta {clock(pace * (self.total - trainer.global_step))}",
        )
        if slowest and (warning := self.stragglers.warning(slowest)):
            self.say(trainer, f"step {trainer.global_step}  {warning}")
        self.reset()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(("valid/", "probe/"))}
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
            self.run_log.say_anyhow(line)


def apart(speed: dict[str, float]) -> str:
    """Return what took time beside the steps, in words for the line."""
    names = {"validation_seconds": "validation", "checkpoint_seconds": "saving"}
    return "".join(f"{said} {speed[name]:.3g} s  " for name, said in names.items() if name in speed)


def clock(seconds: float) -> str:
    """Return seconds as h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
