"""`scfm status`: how a run stands, in a terminal or as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from scfm.run_status import RunStatus, read_status, spoken

if TYPE_CHECKING:
    from rich.console import Console

TICKS = "▁▂▃▄▅▆▇█"
WIDTH = 48  # of a sparkline at most, in characters
NUMBERS = 42  # characters that the numbers beside it take
COLOURS = {"running": "green", "finished": "blue", "stopped": "yellow", "not started": "yellow"}


def status(run: str, *, json: bool = False) -> None:
    """Print how a run stands, by the files of its directory alone: while it runs, from another machine, or a copy.

    Args:
        run: Run directory, the `out` of its recipe.
        json: Print all of it as JSON, for scripts.
    """
    found = read_status(Path(run))
    if json:
        print(as_json(found))
    else:
        print_status(found)


def as_json(found: RunStatus) -> str:
    """Return all that is known of a run as JSON; numbers that are none (a loss of NaN) become null."""

    def finite(value: object) -> object:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(asdict(found)), indent=1, allow_nan=False)


def print_status(found: RunStatus, console: Console | None = None) -> None:
    """Print a run for people: state, speed, losses, checkpoints, and how to go on."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console(highlight=False)
    console.print(f"[bold]{escape(found.run)}[/]: [{COLOURS[found.state]} bold]{found.state}[/]")
    console.print(f"  {found.why}", markup=False)
    if found.about:
        console.print(f"  {found.about}", markup=False)
    console.print()
    facts = Table.grid(padding=(0, 1))
    for name, said in facts_of(found):
        facts.add_row(f" {name}", escape(said))
    console.print(facts)
    if found.losses:
        curves = Table(box=None, padding=(0, 1), header_style="dim")
        for column in (" measured", "over the steps", "first", "last", "lowest"):
            curves.add_column(column, no_wrap=True)
        room = console.width - max(map(len, found.losses)) - NUMBERS
        for name, rows in in_order(found.losses):
            values = [value for _, value in rows]
            lowest = min((value for value in values if math.isfinite(value)), default=math.nan)
            numbers = (values[0], values[-1], lowest)
            curve = sparkline(values, max(min(WIDTH, room), 10))
            curves.add_row(f" {name}", curve, *(f"{value:.4g}" for value in numbers))
        console.print()
        console.print(curves)
    if found.checkpoints:
        saved = Table(box=None, padding=(0, 1), header_style="dim")
        for column in (" checkpoint", "step", "written", "size"):
            saved.add_column(column)
        for one in found.checkpoints:
            step = f"{one.step:,}" if one.step is not None else f"{found.best.get('step', 0):,}"
            saved.add_row(f" {one.name}", step, f"{spoken(one.age_seconds)} ago", size(one.bytes))
        console.print()
        console.print(saved)
    console.print()
    for line in [*found.slow_ranks[-3:], *found.notes]:
        console.print(f"Note: {line}", markup=False)
    if found.model:
        console.print(f"model: {found.model}", markup=False, soft_wrap=True)
    if found.go_on and found.state != "running":
        console.print(f"to go on: {found.go_on}", markup=False, soft_wrap=True)


def facts_of(found: RunStatus) -> list[tuple[str, str]]:
    """Return what is known in single numbers, as pairs of a name and words; what is not known is left out."""
    speed, facts = found.speed, []
    if found.step is not None:
        share = f" of {found.steps:,} ({found.step / found.steps:.0%})" if found.steps else ""
        facts.append(("step", f"{found.step:,}{share}"))
    if found.eta_seconds is not None:
        facts.append(("time left", f"{spoken(found.eta_seconds)}, at the last report"))
    if found.hours is not None:
        facts.append(("time taken", f"{spoken(3600 * found.hours)}, validation and saving included"))
    if "cells_per_second" in speed:
        wait = f", {speed['data_wait']:.1%} of the time waiting for data" if "data_wait" in speed else ""
        facts.append(("speed", f"{speed['cells_per_second']:,.0f} cells/s{wait}"))
    if "mfu" in speed:
        facts.append(("MFU", f"{speed['mfu']:.1%}, {speed['tflops']:.3g} TFLOP/s"))
    if "slowest_rank" in speed:
        ratio = f"{speed['slowest_ratio']:.2f} times the median of the others"
        facts.append(("slowest rank", f"{speed['slowest_rank']:.0f}, {ratio} in its own part of a step"))
    if found.best:
        facts.append(
            ("best so far", f"{found.best['metric']} {found.best['value']:.4g} at step {found.best['step']:,}")
        )
    facts += [(name, f"{value:.4g}") for name, value in found.baselines.items()]
    if found.guard:
        facts.append(("guard", ", ".join(f"{name} {value:.0f}" for name, value in found.guard.items())))
    return facts


def in_order(losses: dict[str, list[tuple[int, float]]]) -> list[tuple[str, list[tuple[int, float]]]]:
    """Return metrics with the whole losses first."""
    return sorted(losses.items(), key=lambda item: (not item[0].endswith("/loss"), item[0]))


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """Return a curve as a line of blocks, from the lowest to the highest of its numbers; `!` where one is none.

    More values than there is room for are averaged, as many in each block.
    """
    n = min(width, len(values))
    edges = [round(i * len(values) / n) for i in range(n + 1)]
    means = [sum(values[start:stop]) / (stop - start) for start, stop in pairwise(edges)]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    room = high - low or 1.0
    return "".join(
        TICKS[round((mean - low) / room * (len(TICKS) - 1))] if math.isfinite(mean) else "!" for mean in means
    )


def size(n_bytes: int) -> str:
    """Return a number of bytes in words."""
    for unit, power in (("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= power:
            return f"{n_bytes / power:.1f} {unit}"
    return f"{n_bytes / 1e3:.1f} kB"
