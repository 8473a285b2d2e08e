"""The figure of integration: types kept against batches mixed, every method named beside its point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from scfm.evaluation.metrics import METRICS
from scfm.evaluation.plots import FAINT, INK, RULE, colours_of, new_figure
from scfm.evaluation.protocol import KINDS

if TYPE_CHECKING:
    from scfm.evaluation.harness import Comparison

Box = tuple[float, float, float, float]  # left, bottom, right, top


def trade_off(comparison: Comparison, x: str, y: str) -> bytes:
    """Draw every method's mean of one score against another, named, with lines of equal 0.6 y + 0.4 x."""
    colours = colours_of(comparison)
    markers = {"model": "D", "baseline": "o", "negative control": "x", "positive control": "*"}
    with new_figure(7.2, 4.4) as (_, (axis,), drawn):
        for level in np.arange(0.1, 1.0, 0.1):
            axis.plot([0, 1], [level / 0.6, (level - 0.4) / 0.6], color=RULE, lw=0.8, ls=":", zorder=1)
            if level >= 0.45:
                axis.text(1.012, (level - 0.4) / 0.6, f"{level:.1f}", color=FAINT, fontsize=7, va="center")
        names = comparison.ranked(*KINDS)
        at = {name: (comparison.summary(name, x).mean, comparison.summary(name, y).mean) for name in names}
        taken = [(px - 0.012, py - 0.018, px + 0.012, py + 0.018) for px, py in at.values()]
        for name in names:
            kind = comparison.kinds[name]
            axis.scatter(*at[name], s=44, color=colours[name], marker=markers[kind], zorder=3)
            box, left = _free_place(at[name], 0.0125 * len(name), taken)
            taken.append(box)
            axis.text(
                box[2] if left else box[0],
                (box[1] + box[3]) / 2,
                name,
                ha="right" if left else "left",
                va="center",
                color=INK if kind in ("model", "baseline") else FAINT,
                fontweight="bold" if kind == "model" else "normal",
            )
        axis.set(xlim=(0, 1.06), ylim=(0, 1.04), xlabel=METRICS[x].title, ylabel=METRICS[y].title)
        axis.grid()
    return drawn.getvalue()


def _free_place(point: tuple[float, float], width: float, taken: Sequence[Box]) -> tuple[Box, bool]:
    """Return where a name covers least of what is there, and whether it stands to the left of its point."""

    def box(left: bool, rise: float) -> Box:
        start = point[0] - 0.016 - width if left else point[0] + 0.016
        return start, point[1] + rise - 0.02, start + width, point[1] + rise + 0.02

    def covered(one: Box) -> float:
        over = [
            max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
            * max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
            for other in taken
        ]
        outside = max(0.0, one[2] - 1.04) + max(0.0, -one[0]) + max(0.0, -one[1])
        return sum(over) + outside

    places = [(left, rise) for rise in (0.0, 0.045, -0.045, 0.09, -0.09) for left in (False, True)]
    left, rise = min(places, key=lambda place: covered(box(*place)))
    return box(left, rise), left
