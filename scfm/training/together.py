"""The processes of a run begin, stop and end together."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments import LightningEnvironment
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from scfm.errors import SAVED, RunStopped, ScfmError
from scfm.training.peers import LOST, Peers
from scfm.training.restarts import meet_afresh
from scfm.training.stopping import Agreement, StopSignals, take_over_signals

NOTICE = 3.0  # seconds between the error of a collective and what tells whose end it was


class Together(L.Callback):
    """Listens to signals, and lets all processes of a run know of each other.

    Args:
        say: prints a line and writes it to the log, in whichever process.
        before_end: lets files be finished before a process is ended for the loss of another.
    """

    def __init__(self, say: Callable[[str], None], before_end: Callable[[], None]) -> None:
        self.say, self.before_end = say, before_end
        self.signals, self.agreement = StopSignals(), Agreement()
        self.peers: Peers | None = None

    @contextmanager
    def running(self, trainer: L.Trainer) -> Iterator[None]:
        """Note signals meanwhile, and say of an error what it is at bottom. Raises RunStopped or ScfmError for it.

        In one of several processes that has lost another, it ends the process.
        """
        meet_afresh()
        take_over_signals(trainer)
        self.signals.launcher = trainer.strategy.launcher
        with self.signals:
            try:
                yield
            except Exception as error:
                reason = self.reason(error, trainer)
                if self.peers is not None and self.peers.lost:
                    print(f"scfm: {reason}", file=sys.stderr)
                    self.peers.leave()
                if reason is error:
                    raise
                raise reason from error

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.signals.listen()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.agreement.start()
        if self.agreement.group is not None:
            self.peers = Peers(self.say, self.before_end)
            self.peers.meet(self.agreement.group)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.part(trainer)

    def part(self, trainer: L.Trainer) -> None:
        """Leave a run in which every process has done its part; called by all of them."""
        if self.peers is not None:
            self.peers.end()
        self.agreement.end()
        trainer.strategy.barrier()

    def exit_code(self, trainer: L.Trainer) -> int:
        """Return how a process that has been asked to stop exits.

        Lightning kills the process that it was started in when one of those that it started itself exits with anything
        but 0; whoever waits for the run sees the code of the first.
        """
        started_by_lightning = isinstance(trainer._accelerator_connector.cluster_environment, LightningEnvironment)
        return 0 if started_by_lightning and trainer.global_rank > 0 else SAVED

    def reason(self, error: Exception, trainer: L.Trainer) -> BaseException:
        """Return what an error of training is at bottom: a run that was stopped, a lost process, bad input, or itself.

        Args:
            error: what `fit` has raised.
            trainer: whose it is.
        """
        if isinstance(error, ProcessExitedException | ProcessRaisedException):  # said by the process that forked them
            return self.reason_of_children(error, trainer)
        if self.peers is not None and self.peers.found.wait(NOTICE):
            return RunStopped(str(self.peers.lost), LOST)
        return error

    @staticmethod
    def reason_of_children(error: Exception, trainer: L.Trainer) -> BaseException:
        codes: list[Any] = [process.exitcode for process in getattr(trainer.strategy.launcher, "procs", [])]
        if SAVED in codes:
            return RunStopped("asked to stop, and saved; continue with --resume auto", SAVED)
        killed = [
            f"rank {rank} (by signal {-code})" for rank, code in enumerate(codes) if code is not None and code < 0
        ]
        if killed:
            return RunStopped(
                f"{' and '.join(killed)} was killed in the middle of the run (out of memory? see dmesg); continue from "
                "the last checkpoint with --resume auto",
                LOST,
            )
        said = re.search(r"scfm\.errors\.ScfmError: (.*)", str(error), re.DOTALL)
        return ScfmError(said.group(1).strip()) if said else error
