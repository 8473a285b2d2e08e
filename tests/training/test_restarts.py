"""Processes that torchrun starts again meet where those before them have left nothing."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from scfm.training.restarts import meet_afresh, restarts


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """The store of a torchrun on one machine, which it keeps from one start of its two workers to the next."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    return store


def meeting_of(monkeypatch: pytest.MonkeyPatch, rank: int, restart: int, world: int = 2) -> tuple[str, str]:
    """Return where a worker meets the others, and whether torchrun hosts that."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
    assert restarts() == restart
    with monkeypatch.context() as worker:
        for name in ("MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
            worker.setenv(name, os.environ[name])
        meet_afresh()
        return os.environ["MASTER_PORT"], os.environ["TORCHELASTIC_USE_AGENT_STORE"]


def test_each_restart_has_a_place_of_its_own(agents: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first = meeting_of(monkeypatch, rank=0, restart=0)
    assert first == (str(agents.port), "True")
    second, third = ([meeting_of(monkeypatch, rank, restart) for rank in (0, 1)] for restart in (1, 2))
    for both in (second, third):
        assert both[0] == both[1]
        assert both[0][1] == "False"
    assert len({first[0], second[0][0], third[0][0]}) == 3


def test_on_several_machines_torchrun_does_it(agents: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert meeting_of(monkeypatch, rank=0, restart=1, world=4) == (str(agents.port), "True")
