"""What the GPU check keeps: rows of figures by part, printed and written to disk as they come, within a deadline."""

from __future__ import annotations

import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Figures = dict[str, Any]


class OutOfTime(BaseException):
    """A part has used its time; not an Exception, so that no handler below the part takes it for a failure."""


class Record:
    """The results so far.

    Args:
        path: JSON file, written anew after every row, so that a crash loses only the row at hand.
        device: where it runs.
        tiny: whether shapes are small, for a try without a GPU.
        deadline: seconds from now until the last part must have ended.

    Attributes:
        ceiling: FLOP/s of large bf16 matrix products, once they are measured.
    """

    def __init__(self, path: Path, device: torch.device, tiny: bool, deadline: float) -> None:
        self.path, self.device, self.tiny = path, device, tiny
        self.started = time.perf_counter()
        self.end = self.limit = self.started + deadline
        self.ceiling: float | None = None
        self.about: Figures = {}
        self.parts: dict[str, Figures] = {}
        self.part = ""

    @contextmanager
    def running(self, part: str, until: float) -> Iterator[None]:
        """Run a part until so many seconds from the start; what goes wrong in it is written down, not raised."""
        self.part, start = part, time.perf_counter()
        self.limit = min(self.end, self.started + until)
        self.parts[part] = {"rows": []}
        print(f"== {part} ({self.left():.0f} s)", flush=True)

        def stop(*_: Any) -> None:
            raise OutOfTime

        # items look at the clock themselves; the alarm ends one that outlasts the whole part
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(self.left(), 0.01))
        try:
            yield
        except OutOfTime:
            self.parts[part]["out_of_time"] = True
        except Exception:
            self.parts[part]["error"] = traceback.format_exc()
            print(self.parts[part]["error"], flush=True)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            self.parts[part]["seconds"] = round(time.perf_counter() - start, 1)
            self.write()

    def left(self) -> float:
        """Return the seconds that the running part still has."""
        return self.limit - time.perf_counter()

    def row(self, item: str, measure: Callable[[], Figures], needs: float = 0.0) -> Figures:
        """Measure an item of the running part and keep its figures, or its failure; {} if it failed or was left out.

        Args:
            item: its name.
            measure: returns its figures.
            needs: seconds that it takes at least; with fewer left it is left out.
        """
        start, figures, error = time.perf_counter(), {}, {}
        try:
            if self.left() < (0 if self.tiny else needs):
                error = {"left_out": f"{self.left():.0f} s are left"}
            else:
                figures = measure()
        except torch.OutOfMemoryError as out:
            error = {"out_of_memory": str(out).split(". ")[0]}
        except OutOfTime:
            self.keep({"item": item, "error": "out of time"})
            raise
        except Exception as wrong:
            error = {"error": f"{type(wrong).__name__}: {wrong}"[:500], "traceback": traceback.format_exc()}
        if error and self.device.type == "cuda":
            torch.cuda.empty_cache()  # outside the handler, which still holds the tensors of the failed call
        self.keep({"item": item, **figures, **error, "took": round(time.perf_counter() - start, 1)})
        return figures

    def keep(self, row: Figures) -> None:
        """Print a row and write everything to disk."""
        self.parts[self.part]["rows"].append(row)
        print(
            "  " + "  ".join(f"{name} {shown(value)}" for name, value in row.items() if name != "traceback"), flush=True
        )
        self.write()

    def write(self) -> None:
        whole = {"bench": "gpu", **self.about, "seconds": round(time.perf_counter() - self.started, 1)}
        written = self.path.with_name(self.path.name + ".tmp")
        written.write_text(json.dumps(whole | {"parts": self.parts}, indent=1) + "\n", encoding="utf-8")
        written.replace(self.path)

    @property
    def failures(self) -> list[str]:
        """Return the items and parts that failed."""
        rows = [
            f"{part}: {row['item']}"
            for part, found in self.parts.items()
            for row in found["rows"]
            if "error" in row or row.get("ok") is False
        ]
        return [part for part, found in self.parts.items() if "error" in found] + rows


def shown(value: Any) -> str:
    """Return a figure as it is printed."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
