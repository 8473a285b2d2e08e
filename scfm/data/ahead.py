"""Reads ahead: the cells of a stage of the order come into memory while those of the stage before are used."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from scfm.data.order import CellOrder
from scfm.data.reading import Loaded, Reader, Several
from scfm.data.store import Rows


class Stages:
    """The stages of an epoch, each loaded once and released when the last batch that needs it has been delivered.

    Args:
        order: which rows come in which stage.
        epoch: of the order.
        reader: how rows are loaded.
    """

    def __init__(self, order: CellOrder, epoch: int, reader: Reader) -> None:
        self.order, self.epoch, self.reader = order, epoch, reader
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="scfm-stage")
        self._lock = Lock()
        self._loading: dict[int, Future[Rows]] = {}
        self._last = order.stages_of(len(order) - 1)[-1] if len(order) else -1

    def of(self, k: int) -> Rows:
        """Wait for the stages of global batch k and return their cells."""
        with self._lock:
            futures = [self._begin(stage) for stage in self.order.stages_of(k)]
        loaded = [future.result() for future in futures]
        if len(loaded) == 1 or not isinstance(loaded[0], Loaded):
            return loaded[0]
        return Several([part for part in loaded if isinstance(part, Loaded)])

    def delivered(self, k: int) -> None:
        """Let go of the stages that no batch after k needs; the next begins to load where fewer than two are held."""
        needed = self.order.stages_of(k + 1).start if k + 1 < len(self.order) else self._last + 1
        with self._lock:
            for stage in [stage for stage in self._loading if stage < needed]:
                self.reader.release(self._loading.pop(stage).result())
            following = max(self._loading, default=needed) + 1
            if len(self._loading) < 2 and following <= self._last:
                self._begin(following)

    def close(self) -> None:
        """End the thread; what has not begun to load never will."""
        self._pool.shutdown(cancel_futures=True)

    def _begin(self, stage: int) -> Future[Rows]:
        if stage not in self._loading:
            self._loading[stage] = self._pool.submit(self._load, stage)
        return self._loading[stage]

    def _load(self, stage: int) -> Rows:
        return self.reader.load(self.order.rows_of_stage(self.epoch, stage))
