"""Keeps an update from ruining the weights: one whose loss or gradient is not finite, or whose loss is a spike.

The decision is made on the device, in tensors, and taken by the optimizer as `found_inf`, as fused optimizers take it
from a gradient scaler: nothing moves, no momentum and no step count either, and the host waits for nothing. What was
left out is read where a line is logged anyway. All processes decide alike, for they see the same summed gradient and
the loss of the whole global batch.

Where many updates in a row are left out, the weights have drifted, and the same batches would end the same way. So
the weights and the optimizer go back to a checkpoint, and the run goes on with the batches that come next (as PaLM's
did, Chowdhery et al. 2022, section 5.1): step, learning rate and order of the cells stay what they were, so that a
batch still is a pure function of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from scfm.errors import ScfmError
from scfm.recipe import GuardConfig
from scfm.training.saving import BackgroundCheckpoints, checkpoints, step_of

LEAST_DEVIATION = 0.01  # of the median: below it noise of the very last digits would be called a spike


class Guard(L.Callback):
    """Leaves harmful updates out, counts and tells them, and goes back where there are many in a row.

    Args:
        config: the recipe's guard section.
        files: where checkpoints are.
        say: prints a line and logs it, in the process that logs.
        every: optimizer steps between two looks at what was left out.
    """

    def __init__(
        self, config: GuardConfig, files: BackgroundCheckpoints, say: Callable[[str], None], every: int
    ) -> None:
        self.config, self.files, self.say, self.every = config, files, say, every
        self.losses: Tensor | None = None  # (window,) the last that were taken, on the device; NaN while there are less
        self.terms: tuple[str, ...] = ()  # what they are sums of
        self.unread: list[tuple[int, Tensor]] = []  # step, and (loss, norm of the gradient, limit, left out or not)
        self.left_out, self.in_a_row, self.rollbacks = 0, 0, 0

    def judge(self, step: int, loss: Tensor, norm: Tensor, terms: Sequence[str]) -> Tensor:
        """Return 1 where an update must be left out, else 0, as a number on the device.

        Args:
            step: which update.
            loss: of this process, a share of the global loss.
            norm: of the gradient that all processes share.
            terms: names of the objectives that the loss is of.
        """
        loss = loss.detach().float().clone()
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).detach().float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(loss)
        if self.losses is None or self.terms != tuple(terms):  # the loss of other objectives is no spike
            self.losses = loss.new_full((self.config.window,), float("nan"))
            self.terms = tuple(terms)
        limit = self.limit(self.losses)
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm)) | (loss > limit)  # no number is above NaN
        self.losses = torch.where(bad, self.losses, torch.cat([self.losses[1:], loss[None]]))
        self.unread.append((step, torch.stack([loss, norm, limit, bad.float()])))
        return bad.float()

    def limit(self, losses: Tensor) -> Tensor:
        """Return the highest loss that is no spike, NaN while there are too few losses to tell: (window,) -> scalar."""
        middle = len(losses) // 2
        median = losses.sort().values[middle]
        deviation = (losses - median).abs().sort().values[middle]
        deviation = torch.maximum(deviation, LEAST_DEVIATION * median.abs())
        tells = ~losses.isnan().any() & (self.config.spike > 0)
        return torch.where(tells, median + self.config.spike * deviation, float("nan"))

    def apply(self, optimizer: Optimizer, bad: Tensor, scaled: bool) -> None:
        """Let an optimizer leave its next update out where `bad` is 1.

        Under a gradient scaler the host reads the decision, as the scaler itself does before every step.
        """
        if not scaled:
            for part in getattr(optimizer, "parts", [optimizer]):
                part.found_inf = bad
        elif bool(bad):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every:
            return
        self.look(trainer)
        if self.in_a_row >= self.config.patience:  # here and nowhere else: a run that was stopped goes back where an
            self.go_back(trainer)  # unbroken one would

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.look(trainer)

    def look(self, trainer: L.Trainer) -> None:
        """Read what was left out since the last look, count it and say it."""
        steps, self.unread = self.unread, []
        rows = torch.stack([row for _, row in steps]).tolist() if steps else []
        before = self.left_out
        for (step, _), (loss, norm, limit, bad) in zip(steps, rows, strict=True):
            self.in_a_row = self.in_a_row + 1 if bad else 0
            if not bad:
                continue
            self.left_out += 1
            self.say(f"step {step + 1}: update left out ({why(loss, norm, limit)}), {place(trainer, step)}")
        if self.left_out > before:
            self.record(trainer, "guard/left_out", self.left_out)

    def go_back(self, trainer: L.Trainer) -> None:
        """Give network and optimizer the weights and the state that they had at a checkpoint.

        Raises ScfmError where there is none to go back to, or it was tried often enough.
        """
        many = f"{self.in_a_row} updates in a row were left out"
        if self.rollbacks >= self.config.rollbacks:
            raise ScfmError(
                f"step {trainer.global_step}: {many}, and the weights have gone back {self.rollbacks} times already. "
                "Lower optimizer.lr or optimizer.clip, or look at the cells of these batches; where losses above the "
                "limit are meant, raise guard.spike. --resume auto continues with a higher guard.rollbacks"
            )
        self.files.wait()
        chosen = trainer.strategy.broadcast(self.checkpoint_before(trainer.global_step - self.in_a_row))
        if chosen is None:
            raise ScfmError(
                f"step {trainer.global_step}: {many}, and there is no checkpoint before them to go back to. Lower "
                "optimizer.lr or optimizer.clip, raise optimizer.warmup, or save more often (checkpoint.every_steps)"
            )
        strategy, optimizer = trainer.strategy, trainer.optimizers[0]
        rates = [group["lr"] for group in optimizer.param_groups]
        checkpoint = strategy.load_checkpoint(chosen, weights_only=True)
        strategy.load_model_state_dict(checkpoint, strict=True)
        strategy.load_optimizer_state_dict(checkpoint)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.losses = self.on_device(checkpoint["callbacks"][self.state_key]["losses"], trainer)
        self.rollbacks += 1
        self.in_a_row = 0
        self.say(f"step {trainer.global_step}: {many}; weights and optimizer go back to {chosen}, the batches go on")
        self.record(trainer, "guard/rollbacks", self.rollbacks)

    def checkpoint_before(self, step: int) -> str | None:
        """Return the newest checkpoint of weights that are older than those at a step."""
        older = [path for path in checkpoints(self.files.folder) if step_of(path) < step]
        return str(older[-1]) if older else None

    def record(self, trainer: L.Trainer, name: str, value: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({name: float(value)}, step=trainer.global_step)

    @staticmethod
    def on_device(losses: Tensor | None, trainer: L.Trainer) -> Tensor | None:
        return None if losses is None else losses.to(trainer.strategy.root_device)

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": self.losses,
            "terms": list(self.terms),
            "left_out": self.left_out,
            "in_a_row": self.in_a_row,
            "rollbacks": self.rollbacks,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses, self.terms = state_dict["losses"], tuple(state_dict["terms"])
        self.left_out, self.in_a_row = state_dict["left_out"], state_dict["in_a_row"]
        self.rollbacks = state_dict["rollbacks"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.losses = self.on_device(self.losses, trainer)
        if self.losses is not None and len(self.losses) != self.config.window:
            self.losses = None  # another window than before the stop


def why(loss: float, norm: float, limit: float) -> str:
    """Say what is wrong with an update."""
    if loss > limit:
        return f"its loss {loss:.4g} is a spike, above {limit:.4g}"
    return f"not finite: loss {loss:.4g}, gradient {norm:.4g}"


def place(trainer: L.Trainer, step: int) -> str:
    """Say which batch of which epoch a step takes, both counted from 1."""
    loader: Any = getattr(trainer.datamodule, "loader", None)  # type: ignore[attr-defined]
    if loader is None:
        return "batch unknown"
    epoch, batch = divmod(step, len(loader))
    return f"batch {batch + 1} of {len(loader)}, epoch {epoch + 1}"
