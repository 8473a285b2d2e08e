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


def series(metrics: list[tuple[int, str, float]]) -> dict[str, list[tuple[int, float]]]:
    """Return the rows by metric: name -> (step, value) pairs in the order in which they were written."""
    found: dict[str, list[tuple[int, float]]] = {}
    for step, name, value in metrics:
        found.setdefault(name, []).append((step, value))
    return found


def hours_of(metrics: list[tuple[int, str, float]]) -> float | None:
    """Return the hours that the steps of a run took, validation and saving included; None where it did not say.

    Steps that a resumed run took again count once.
    """
    by_name = series(metrics)
    seconds, before = 0.0, 0
    for step, each in by_name.get("speed/step_seconds", []):
        seconds += (step - before) * each
        before = step
    beside = [by_name.get(f"speed/{what}_seconds", []) for what in ("validation", "checkpoint")]
    seconds += sum(value for rows in beside for _, value in rows)
    return seconds / 3600 if before else None
