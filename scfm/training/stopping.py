"""How a run is asked to stop, and how its processes agree on the step at which they do.

SIGTERM, and SIGUSR1, by which SLURM can warn before the time is up, only leave a note. Every process reads it between
two steps, and what one has noted all must act on at the same step: a pair of numbers is reduced over the processes,
on the CPU and beside the training, so that no GPU is waited for.

Lightning's own part is turned off. Its SIGTERM handler starts a collective from within the handler, which hangs unless
all processes get the signal at once; its loop broadcasts a flag and reads it back before every step, which makes the
host wait for the GPU; it ends a run without a checkpoint; and under SLURM it saves in the middle of a step and calls
`scontrol requeue` itself, while here the job script does that, on the exit code.
"""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopSignals:
    """Notes SIGTERM and SIGUSR1 while a run lasts; as many as may come, a note is all that they leave.

    Handlers live in the main thread: a run that was started from another one is not asked to stop by signals.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self.before: dict[int, Any] = {}
        self.launcher: Any = None

    def __enter__(self) -> StopSignals:
        self.before = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        """Set the handlers; a process that was not forked has to do so itself."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self.note)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Note a signal, and pass it on to the processes that this one has started."""
        self.asked = signal.Signals(number).name
        if self.launcher is not None:
            self.launcher.kill(number)

    def __getstate__(self) -> dict[str, Any]:
        return {"asked": None, "before": {}, "launcher": None}  # of a process that is spawned


@dataclass(frozen=True)
class Word:
    """What a process wants done before the next step, or what all of them have agreed to do.

    Attributes:
        stop: save and end the run.
        save: save and go on.
    """

    stop: bool = False
    save: bool = False


class Agreement:
    """Lets the processes of a run do the same before the same step: what one of them wants, all do.

    The word of a step travels while the step computes, and counts before the one after it.
    """

    def __init__(self) -> None:
        self.group: Any = None
        self.sent: tuple[torch.Tensor, Any] | None = None

    def start(self) -> None:
        """Meet the other processes; called by all of them."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo")

    def reach(self, mine: Word) -> Word:
        """Return what all do now; called by all processes before every step."""
        if self.group is None:
            return mine
        agreed = Word()
        if self.sent is not None:
            numbers, work = self.sent
            work.wait()
            agreed = Word(*map(bool, numbers.tolist()))
        numbers = torch.tensor([mine.stop, mine.save and not agreed.save], dtype=torch.int32)
        self.sent = numbers, dist.all_reduce(numbers, dist.ReduceOp.MAX, self.group, async_op=True)
        return agreed

    def end(self) -> None:
        """Wait for the last word, which nobody needs: what is on its way when a process ends would disturb others."""
        if self.sent is not None:
            self.sent[1].wait()
            self.sent = None


def take_over_signals(trainer: L.Trainer) -> None:
    """Turn off what Lightning does about signals, see above. Raises AssertionError where it has changed its names."""
    for owner, name in (
        (trainer._signal_connector, "register_signal_handlers"),
        (trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor"),
    ):
        assert hasattr(owner, name), f"this version of Lightning has no {name}; see scfm.training.stopping"
        setattr(owner, name, _nothing)


def _nothing() -> None:
    """Stands in for a method."""
