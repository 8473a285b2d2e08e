"""What every benchmark prints: a line for people on stderr, and JSON that says where the numbers come from."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from scfm.errors import ScfmError
from scfm.evaluation.provenance import provenance


def publish(what: str, result: dict[str, Any], line: str, out: str | None) -> None:
    """Print a line on stderr and the result as JSON on stdout, and write the JSON to a file where one is named."""
    text = json.dumps({"bench": what, **result, **provenance()}, indent=1)
    if out is not None:
        Path(out).write_text(text + "\n", encoding="utf-8")
    print(line, file=sys.stderr)
    print(text)


def of_rates(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Return the median and the best of repeated rates, the more the better."""
    return {"median": significant(median(values), digits), "best": significant(max(values), digits)}


def of_times(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Return the median and the best of repeated times, the fewer the better."""
    return {"median": significant(median(values), digits), "best": significant(min(values), digits)}


def significant(value: float, digits: int = 4) -> float:
    """Return a number rounded to some significant digits."""
    return float(f"{value:.{digits}g}")


def device_name(device: torch.device | str) -> str:
    """Return what a device calls itself, and for a CPU the threads that torch uses on it."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


def _processor() -> str:
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def at_least_one(**numbers: int) -> None:
    """Raise ScfmError naming the first option that is below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise ScfmError(f"--{name.replace('_', '-')}: {number} must be at least 1")
