"""metrics.csv of a run: one row per value, read here without torch."""

from __future__ import annotations

import csv
from pathlib import Path

METRICS_HEADER = ["step", "metric", "value"]


def read_metrics(path: Path) -> list[tuple[int, str, float]]:
    """Return the rows of a metrics.csv as (step, metric, value); a row cut short by a kill is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[1:]:
        row = next(csv.reader([line]), [])
        if line.endswith("\n") and len(row) == 3:
            found.append((int(row[0]), row[1], float(row[2])))
    return found
