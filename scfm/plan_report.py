"""How a plan is shown: a table where someone looks at it, plain text where it is piped, JSON where it is asked for."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from scfm.plan import Plan
from scfm.training.callbacks import clock

Rows = list[tuple[str, str]]


def write(plan: Plan, path: Path) -> None:
    """Write a plan as JSON, in bytes, seconds and FLOPs."""
    path.write_text(json.dumps(asdict(plan), indent=1) + "\n", encoding="utf-8")


def show(plan: Plan) -> None:
    """Print a plan."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        print(plain(plan))
        return
    table = Table(box=SIMPLE_HEAD, title=f"Plan for {title(plan)}", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, rows in sections_of(plan):
        table.add_section()
        table.add_row(f"[dim]{name}[/dim]", "")
        for key, value in rows:
            table.add_row(f"  {key}", escape(value))
    console.print(table)
    for line in plan.assumptions:
        console.print(f"[dim]·[/dim] {escape(line)}", highlight=False)


def plain(plan: Plan) -> str:
    """Return a plan as aligned lines."""
    sections = sections_of(plan)
    width = max(len(key) for _, rows in sections for key, _ in rows)
    lines = [
        line for name, rows in sections for line in (name, *(f"  {key:<{width}}  {value}" for key, value in rows), "")
    ]
    return "\n".join([*lines, "this rests on", *(f"  {line}" for line in plan.assumptions)])


def title(plan: Plan) -> str:
    return "this CPU" if plan.device == "cpu" else f"{plan.devices} x {plan.device}"


def sections_of(plan: Plan) -> list[tuple[str, Rows]]:
    """Return what is shown, by section."""
    first, last = plan.flops_per_cell
    memory, gib = plan.memory, 2**30
    later = [] if first == last else [("training, once all objectives are active", f"{last / 1e9:,.2f} GFLOP")]
    filled = plan.packs.rounds * plan.packs.tokens * plan.devices
    fits = memory["total"] <= plan.memory_available
    largest = f"{plan.largest_pack:,}" if plan.largest_pack else "none: not even the longest cell fits"
    speed = [("ceiling of one device", f"{plan.ceiling / 1e9:,.0f} GFLOP/s"), ("MFU", f"{plan.mfu:.1%}")]
    return [
        ("device", [("planned for", title(plan)), *speed]),
        (
            "parameters",
            [(name.replace("_", " "), f"{number:,}") for name, number in plan.parameters.items() if name != "rest"]
            + [("other", f"{plan.parameters['rest']:,}")],
        ),
        (
            "work of a cell",
            [
                ("tokens, mean", f"{plan.tokens_per_cell:,.1f}"),
                ("training, at the first step", f"{first / 1e9:,.2f} GFLOP"),
                *later,
            ],
        ),
        (
            "global batch",
            [
                ("packs of each process", f"{plan.packs.rounds:,}"),
                ("tokens of the largest pack", f"{plan.packs.tokens:,}"),
                ("filled with pseudo-cells", f"{plan.packs.filling / filled:.1%}"),
            ],
        ),
        (
            "memory of one device",
            [(name, f"{memory[name] / gib:,.2f} GiB") for name in memory]
            + [
                ("available", f"{plan.memory_available / gib:,.2f} GiB" + ("" if fits else ": DOES NOT FIT")),
                ("largest tokens_per_pack that fits", largest),
            ],
        ),
        ("run", run_rows(plan)),
    ]


def run_rows(plan: Plan) -> Rows:
    """Return steps, time and files."""
    files = [
        ("checkpoint to resume from", f"{plan.checkpoint_bytes / 1e6:,.1f} MB"),
        ("exported model", f"{plan.model_bytes / 1e6:,.1f} MB"),
    ]
    if plan.steps is None or plan.seconds is None or plan.device_hours is None:
        return [("steps and time", "not known: give data.shards, --cells or --trainer.max_steps"), *files]
    hours = [("device hours", f"{plan.device_hours:,.2f}")] if plan.device != "cpu" else []
    return [
        ("optimizer steps", f"{plan.steps:,}"),
        ("validations", f"{plan.validations:,.1f}"),
        ("time", f"{clock(plan.seconds)} ({plan.seconds / 3600:,.2f} h, {plan.seconds:,.0f} s)"),
        *hours,
        *files,
    ]
