"""Processes that torchrun has started again (`--max-restarts`): they resume, and meet at a place of their own."""

from __future__ import annotations

import os
import socket

from torch.distributed import TCPStore


def restarts() -> int:
    """Return how often torchrun has started the processes of this run again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def meet_afresh() -> None:
    """Let processes that were started again on one machine meet in a new store.

    torchrun (torch 2.13) hands them the store of the processes before them, in which these have left their addresses:
    whoever reads one of them knocks at a door where nobody is, for half a minute or for good. On several machines the
    count of restarts is not the same everywhere; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 has torchrun do this.
    """
    one_machine = os.environ.get("WORLD_SIZE") == os.environ.get("LOCAL_WORLD_SIZE")
    if not restarts() or not one_machine or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    key = f"scfm: port of restart {restarts()}"
    if os.environ["RANK"] == "0":
        with socket.socket() as free:
            free.bind(("", 0))
            store.set(key, str(free.getsockname()[1]))
    os.environ["MASTER_PORT"] = store.get(key).decode()  # waits until rank 0 has said it
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # rank 0 opens the new one
