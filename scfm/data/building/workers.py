"""Who does the work: this process, processes beside it, or a Dask cluster; and how much fits in memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

from scfm.data.building.directory import Interrupted
from scfm.data.building.plan import VALUES_PER_SHARD, Sizes
from scfm.data.sources import VALUES_PER_BLOCK
from scfm.errors import ScfmError

GIB = 2**30
BYTES_PER_PROCESS = 320 * 2**20  # the interpreter and its libraries
BYTES_PER_VALUE_READ = 40  # two blocks as they come, and one by vocabulary id
BYTES_PER_VALUE_HELD = 12  # a unit or a shard, and what is made of it
VALUES_PER_UNIT = 2**26
WORTH_PROCESSES = 2**28  # bytes of sources; processes take seconds to start


def sizes_for(memory: float, workers: int | None) -> Sizes:
    """Return how many values a unit and a shard may hold, given the memory of all processes in GiB.

    Raises ScfmError where the memory is too small for one process.
    """
    least = BYTES_PER_PROCESS + VALUES_PER_BLOCK * (BYTES_PER_VALUE_READ + BYTES_PER_VALUE_HELD)
    free = memory * GIB - BYTES_PER_PROCESS
    if free < least:
        raise ScfmError(f"--memory {memory:g}: at least {(least + BYTES_PER_PROCESS) / GIB:.1f} GiB are needed")
    processes = min(workers or available_cores(), int(free // least))
    of_each = free / processes - BYTES_PER_PROCESS - VALUES_PER_BLOCK * BYTES_PER_VALUE_READ
    return Sizes(
        values_per_unit=min(VALUES_PER_UNIT, int(of_each / BYTES_PER_VALUE_HELD)),
        # the same for any number of processes, for shards are what the build makes
        values_per_shard=min(VALUES_PER_SHARD, int((free - BYTES_PER_PROCESS) / BYTES_PER_VALUE_HELD)),
    )


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Crew:
    """Runs jobs that are independent of each other, each known by a path and a few numbers.

    Args:
        workers: processes; None takes as many as there are cores, and none beside this one for little work.
        memory: GiB of all processes together.
        n_bytes: size of the sources, None where unknown.
        dask: address of a Dask scheduler, whose workers take the place of processes.
    """

    def __init__(self, workers: int | None, memory: float, n_bytes: int | None, dask: str | None) -> None:
        self.memory, self.dask = memory, dask
        little = workers is None and n_bytes is not None and n_bytes < WORTH_PROCESSES
        self.workers = 1 if little else workers or available_cores()

    def run(
        self, job: Callable[..., int | None], calls: Iterable[tuple[Any, ...]], bytes_each: float
    ) -> Iterator[int | None]:
        """Call a function with each of the arguments, and yield what it returns as it comes.

        Args:
            job: a function of a module.
            calls: its arguments.
            bytes_each: memory that one call takes, besides that of a process.

        Raises ScfmError where one call does not fit in the memory, and what the function raises; calls that have begun
        are then waited for, so that their work is kept.
        """
        pending = list(calls)
        each = BYTES_PER_PROCESS + bytes_each
        fitting = int((self.memory * GIB - BYTES_PER_PROCESS) // each)
        if fitting < 1 and not self.dask:
            raise ScfmError(
                f"--memory {self.memory:g}: this build was begun with pieces that need "
                f"{(each + BYTES_PER_PROCESS) / GIB:.1f} GiB; allow that much, or begin anew with --restart"
            )
        workers = min(self.workers, fitting, len(pending))
        if workers <= 1 and not self.dask:
            for arguments in pending:
                yield job(*arguments)
            return
        with self._executor(workers) as executor:
            futures: list[Future[int | None]] = []
            try:
                futures += [executor.submit(job, *arguments) for arguments in pending]
                for future in as_completed(futures):
                    yield future.result()
            except BrokenProcessPool as error:
                raise Interrupted(
                    "a worker process ended before its time (out of memory? then allow fewer --workers; or a script "
                    'that calls prepare() outside of `if __name__ == "__main__":`?); what is finished is kept, and the '
                    "same command goes on"
                ) from error
            finally:
                for future in futures:
                    future.cancel()
                executor.shutdown()

    @contextmanager
    def _executor(self, workers: int) -> Iterator[Executor]:
        if self.dask is None:
            # Forking a process with threads (progress, Arrow, HDF5) can hang; a server that has none forks workers.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["scfm.data.building.assembling"])
            with ProcessPoolExecutor(workers, context, initializer=_begin_worker) as executor:
                yield executor
            return
        try:
            from distributed import Client
        except ImportError as error:
            raise ScfmError("--dask needs the package distributed: pip install 'scfm[dask]'") from error
        with Client(self.dask) as client:
            yield client.get_executor(pure=False)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides what an interrupt means
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the main one does, which may have been killed and cannot say so."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
