"""What a method costs: wall time and the peak of memory, step by step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS, PEAK_SINCE = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Stopwatch:
    """Measures the steps of a method; a step that is entered twice is added up.

    Attributes:
        seconds: step -> wall time.
        peak_mib: the most memory that the process held during any step, what it held before included; None where the
            system does not tell (it does on Linux).
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.peak_mib: float | None = None

    @contextmanager
    def measure(self, step: str) -> Iterator[None]:
        """Measure what happens inside, also where it fails."""
        counted = _forget_peak()
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] += time.perf_counter() - started
            if counted:
                self.peak_mib = max(self.peak_mib or 0.0, _peak_mib())


def _forget_peak() -> bool:
    """Let the peak of this process count from here; False where the system has no such thing."""
    try:
        PEAK_SINCE.write_text("5", encoding="ascii")
    except OSError:  # not Linux, or a container that forbids it
        return False
    return STATUS.exists()


def _peak_mib() -> float:
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
