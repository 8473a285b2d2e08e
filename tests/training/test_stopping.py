"""Signals leave a note, and what Lightning would do about them is turned off."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest

from scfm.training import stopping
from scfm.training.stopping import SIGNALS, Agreement, StopSignals, Word, take_over_signals


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in SIGNALS]


def test_a_signal_is_noted_and_passed_on() -> None:
    passed: list[int] = []
    before = handlers()
    with StopSignals() as signals:
        signals.launcher = SimpleNamespace(kill=passed.append)
        assert signals.asked is None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
            assert signals.asked == number.name
    assert passed == [signal.SIGTERM, signal.SIGUSR1]
    assert handlers() == before


def test_one_process_agrees_with_itself() -> None:
    agreement = Agreement()
    agreement.start()
    for word in (Word(), Word(stop=True), Word(save=True)):
        assert agreement.reach(word) == word
    agreement.end()


def test_lightning_sets_no_handler() -> None:
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    before = handlers()
    take_over_signals(trainer)
    trainer._signal_connector.register_signal_handlers()
    assert handlers() == before
    assert trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor is stopping._nothing


def test_a_lightning_of_other_names_is_noticed() -> None:
    trainer: Any = SimpleNamespace(_signal_connector=None, fit_loop=SimpleNamespace(epoch_loop=None))
    with pytest.raises(AssertionError, match="this version of Lightning has no register_signal_handlers"):
        take_over_signals(trainer)
