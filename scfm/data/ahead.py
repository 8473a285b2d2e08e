"""Works ahead: cells of a stage of the order come into memory, and batches are made, while those before are used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from scfm.data.order import Order
from scfm.data.reading import Reader, Several
from scfm.data.store import Rows

Part = tuple[NDArray[np.int64], Rows]
Made = TypeVar("Made")
TOGETHER = 1024  # cells that are prepared at once; the calls for a small batch alone take longer than its cells


def groups_of(order: Order, start: int) -> Iterator[range]:
    """Yield the global batches from `start` on in groups of about 1,024 cells that lie in the same stages."""
    most = max(1, TOGETHER // order.cells_per_batch)
    while start < len(order):
        stages, end = order.stages_of(start), min(start + most, len(order))
        if order.stages_of(end - 1) != stages:
            end = next(k for k in range(start + 1, end) if order.stages_of(k) != stages)
        yield range(start, end)
        start = end


def made_ahead(
    groups: Iterator[range], make: Callable[[range], Made], threads: int, batches: int
) -> Generator[tuple[range, Made], None, None]:
    """Yield each group of global batches and what is made of it, in order, made on threads before it is asked for.

    At least so many batches are made ahead, and a group on every thread. Closing the generator ends the threads; an
    error in one is raised here.
    """
    ahead: deque[tuple[range, Future[Made]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="scfm-loader") as pool:

        def fill_up() -> None:
            while len(ahead) < threads or sum(len(ks) for ks, _ in ahead) < batches:
                if (ks := next(groups, None)) is None:
                    return
                ahead.append((ks, pool.submit(make, ks)))

        try:
            fill_up()
            while ahead:
                ks, made = ahead.popleft()
                result = made.result()
                fill_up()
                yield ks, result
        finally:
            for _, unwanted in ahead:
                unwanted.cancel()


class Stages:
    """The stages of an epoch, each loaded once and released when the last batch that needs it has been delivered.

    Args:
        order: which rows come in which stage.
        epoch: of the order.
        reader: how rows are loaded.
    """

    def __init__(self, order: Order, epoch: int, reader: Reader) -> None:
        self.order, self.epoch, self.reader = order, epoch, reader
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="scfm-stage")
        self._lock = Lock()
        self._loading: dict[int, Future[Part]] = {}
        self._last = order.stages_of(len(order) - 1)[-1] if len(order) else -1

    def of(self, k: int) -> Rows:
        """Wait for the stages of global batch k and return their cells."""
        with self._lock:
            futures = [self._begin(stage) for stage in self.order.stages_of(k)]
        parts = [future.result() for future in futures]
        _, first = parts[0]
        return first if all(loaded is first for _, loaded in parts) else Several(parts)

    def delivered(self, k: int) -> None:
        """Let go of the stages that no batch after k needs; the next begins to load where fewer than two are held."""
        needed = self.order.stages_of(k + 1).start if k + 1 < len(self.order) else self._last + 1
        with self._lock:
            for stage in [stage for stage in self._loading if stage < needed]:
                self.reader.release(self._loading.pop(stage).result()[1])
            following = max(self._loading, default=needed) + 1
            if len(self._loading) < 2 and following <= self._last:
                self._begin(following)

    def close(self) -> None:
        """End the thread, and let go of all that was loaded."""
        self._pool.shutdown(cancel_futures=True)
        for future in self._loading.values():
            if not future.cancelled() and future.exception() is None:
                self.reader.release(future.result()[1])

    def _begin(self, stage: int) -> Future[Part]:
        if stage not in self._loading:
            self._loading[stage] = self._pool.submit(self._load, stage)
        return self._loading[stage]

    def _load(self, stage: int) -> Part:
        rows = self.order.rows_of_stage(self.epoch, stage)
        return rows, self.reader.load(rows)
