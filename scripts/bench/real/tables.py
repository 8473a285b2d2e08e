"""Markdown tables of reports that `scfm evaluate` wrote: python scripts/bench/real/tables.py REPORT/metrics.json ..."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = {"annotation": ("macro_f1", "accuracy"), "integration": ("s_bio", "s_batch", "s_final")}
DECIDES = {"annotation": "macro_f1", "integration": "s_bio"}
KINDS = ("model", "baseline", "negative control", "positive control")


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation as the table writes them."""
    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation}" if len(values) else "failed"


def beside_best(found: dict[str, Any], method: str) -> str:
    """Return a model's difference to the best baseline with its intervals, over cells and over donors."""
    for one in found["differences"]:
        if (one["model"], one["metric"]) == (method, DECIDES[found["task"]]):
            said = f"{one['difference']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})"
            if one["low_over_donors"] is not None:
                said += f"; donors {one['low_over_donors']:+.3f} to {one['high_over_donors']:+.3f}"
            return said.replace("-", "−")
    return ""


def table(found: dict[str, Any]) -> str:
    """Return the scores of a report, models first, and its leakage and notes below."""
    metrics = COLUMNS[found["task"]]
    baseline = next((one["baseline"] for one in found["differences"] if one["metric"] == DECIDES[found["task"]]), "")
    head = ["method", *(name.replace("_", " ") for name in metrics)]
    head += [f"{DECIDES[found['task']].replace('_', ' ')} − {baseline} (95 % interval)", "seconds"]
    lines = [f"**{found['title']}**", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for kind in KINDS:
        for method, about in found["methods"].items():
            if about["kind"] != kind:
                continue
            rows = [row for row in found["rows"] if row["method"] == method and row["value"] is not None]
            scores = [spread([row["value"] for row in rows if row["metric"] == name]) for name in metrics]
            seconds = np.mean([row["seconds_fit"] + row["seconds_predict"] for row in rows]) if rows else 0.0
            name = f"**{method}**" if kind == "model" else method
            lines.append(f"| {' | '.join([name, *scores, beside_best(found, method), f'{seconds:.0f}'])} |")
    counted = {(one["method"], one["seen"], one["cells"]) for one in found["leakage"]}
    lines += ["", f"commit {found['commit'][:7]}; seeds {len(found['splits'])}; {found['splits'][0]['protocol']}"]
    lines += [f"leakage: {method}: {seen} of {cells} held-out cells" for method, seen, cells in sorted(counted)]
    return "\n".join([*lines, *(f"- {note}" for note in found["caveats"]), ""])


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(table(json.loads(Path(path).read_text(encoding="utf-8"))))
