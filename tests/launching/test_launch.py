"""scripts/launch with a stand-in for scfm: restarts, signals, hosts."""

from __future__ import annotations

import os
import signal

import pytest
from launchpad import Launchpad, until

pytestmark = pytest.mark.distributed

BOX, TORCHRUN = "scripts/launch/box.sh", "scripts/launch/torchrun.sh"
GIVEN = ["recipe.yaml", "shards", "run"]


@pytest.mark.parametrize(
    ("does", "starts", "code"),
    [
        ("crash crash done", 3, 0),
        ("crash", 3, 1),
        ("crash crash further crash done", 5, 0),
        ("further nothing crash crash done", 5, 0),
        ("crash crash nothing crash crash crash", 6, 1),
        ("bad", 1, 2),
    ],
)
def test_box_starts_a_run_again_but_not_for_ever(stand_in: Launchpad, does: str, starts: int, code: int) -> None:
    box = stand_in.start(BOX, *GIVEN, DOES=does, CRASHES="2")
    assert box.wait(30) == code, stand_in.log()
    assert len(stand_in.noted("starts")) == starts
    assert all(line.endswith("--trainer.devices auto --resume auto") for line in stand_in.noted("starts"))


def test_box_outlives_the_terminal_and_ends_when_told(stand_in: Launchpad) -> None:
    box = stand_in.start(BOX, *GIVEN, DOES="train")
    until((stand_in.notes / "ready-1-0").exists)
    os.killpg(box.pid, signal.SIGHUP)
    os.kill(box.pid, signal.SIGUSR1)
    until((stand_in.notes / "ready-2-0").exists)
    os.kill(box.pid, signal.SIGTERM)
    assert box.wait(30) == 75, stand_in.log()
    assert stand_in.noted("signals") == ["rank 0: USR1", "rank 0: TERM"]
    assert f"log: run.out; stop: kill -TERM {box.pid}" in stand_in.log()


def test_torchrun_starts_on_every_host_in_the_same_folder(stand_in: Launchpad) -> None:
    run = stand_in.start(TORCHRUN, *GIVEN, "--data.obs", "a 'b'", HOSTS="one two")
    assert run.wait(30) == 0, stand_in.log()
    assert sorted(stand_in.noted("hosts")) == ["one", "two"]
    meeting = "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=one:29400 --rdzv-id=run --nproc-per-node=2"
    asked = "--config recipe.yaml --data.shards shards --out run --trainer.devices 2 --trainer.num_nodes 2"
    command = f"{meeting} --max-restarts=3 --no-python scfm pretrain {asked} --data.obs a 'b' --resume auto"
    assert stand_in.noted("torchruns") == [f"{stand_in.folder}: {command}"] * 2


def test_torchrun_fails_where_a_host_fails(stand_in: Launchpad) -> None:
    run = stand_in.start(TORCHRUN, *GIVEN, HOSTS="one two", TORCHRUN_CODE="1")
    assert run.wait(30) == 1, stand_in.log()
