"""Is every process of a run still there? One that is lost ends the others within seconds, and says which it was.

A collective does not say it: gloo raises something about a closed connection, and NCCL waits, for half an hour by
default, while a kernel spins that no Python code can end. So every process watches the others on its machine through
file descriptors of theirs (pidfd, Linux), which wake a thread the moment that one ends.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import torch.distributed as dist

LOST = 1  # the exit code
GRACE = 10.0  # seconds in which a process may end by itself before it is made to


class Peers(threading.Thread):
    """Watches the other processes of a run on this machine; on other machines their own launcher does it.

    Args:
        say: prints a line and writes it to the log of the run, called in the thread.
        before_end: called in the thread before it ends the process, to let files be finished.
    """

    def __init__(self, say: Callable[[str], None], before_end: Callable[[], None]) -> None:
        super().__init__(daemon=True, name="peers")
        self.say, self.before_end = say, before_end
        self.lost: str | None = None
        self.found = threading.Event()  # a process is lost
        self.over = False
        self.descriptors: dict[int, tuple[int, int]] = {}  # file descriptor -> rank, process id

    def meet(self, group: Any) -> None:
        """Learn who the others are, and begin to watch; called by all processes of the group."""
        me = (dist.get_rank(), machine(), os.getpid())
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, me, group)
        self.here = [(rank, process) for rank, where, process in everyone if where == me[1]]
        self.rank = me[0]
        if not hasattr(os, "pidfd_open"):
            return
        for rank, process in self.here:
            if rank != self.rank:
                self.descriptors[os.pidfd_open(process)] = rank, process
        self.start()

    def run(self) -> None:
        gone = select.poll()
        for descriptor in self.descriptors:
            gone.register(descriptor, select.POLLIN)
        lost = [self.descriptors[descriptor] for descriptor, _ in gone.poll()]
        for descriptor in self.descriptors:
            os.close(descriptor)
        if self.over:
            return
        names = " and ".join(f"rank {rank} (process {process})" for rank, process in lost)
        self.lost = (
            f"{names} on {socket.gethostname()} ended in the middle of the run: killed (out of memory? see dmesg), or "
            "for the reason that it printed itself; all processes end now. Continue from the last checkpoint with "
            "--resume auto"
        )
        self.found.set()
        remaining = [rank for rank, _ in self.here if rank not in dict(lost)]
        if self.rank == min(remaining):
            self.say(self.lost)
        time.sleep(GRACE)
        self.leave()

    def leave(self) -> NoReturn:
        """End this process at once: what is left of its process group would hang in being taken apart."""
        self.before_end()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(LOST)

    def end(self) -> None:
        """Take the end of any process from now on as the end of the run."""
        self.over = True


def machine() -> str:
    """Return what two processes have in common that can see each other by their process ids."""
    namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return f"{socket.gethostname()} {namespace}"
