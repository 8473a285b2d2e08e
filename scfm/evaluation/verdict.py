"""What the scores say, in words: who wins, by how much, how sure that is, and which scores say nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from scfm.errors import ScfmError
from scfm.evaluation.bootstrap import Interval, paired_bootstrap
from scfm.evaluation.metrics import METRICS

if TYPE_CHECKING:
    from scfm.evaluation.harness import Comparison
    from scfm.evaluation.protocol import Resampled


FEW_DONORS = 10


@dataclass(frozen=True)
class Difference:
    """A model against the best baseline on one metric: positive where the model is ahead.

    Attributes:
        interval: over cells.
        donors: over donors, and cells within them; None where there are not two donors.
        silent: whether the metric says nothing on these data, so that nobody wins.
    """

    model: str
    baseline: str
    metric: str
    interval: Interval
    seeds_ahead: int
    seeds: int
    donors: Interval | None = None
    silent: bool = False

    @property
    def outcome(self) -> str:
        """`model`, `baseline`, `undecided` where an interval includes zero, `uninformative` where the metric is."""
        if self.silent:
            return "uninformative"
        intervals = [one for one in (self.interval, self.donors) if one is not None]
        if all(one.low > 0 for one in intervals):
            return "model"
        return "baseline" if all(one.high < 0 for one in intervals) else "undecided"

    def __str__(self) -> str:
        behind_first = self.interval.difference < 0
        ahead, behind = (self.baseline, self.model) if behind_first else (self.model, self.baseline)
        title, by = METRICS[self.metric].title, abs(self.interval.difference)
        if self.silent:
            return (
                f"{capitalised(title)} decides nothing between {self.model} and {self.baseline}: by the controls it "
                "says nothing here."
            )
        if self.outcome != "undecided":
            spans = self._spans(behind_first, lambda value: f"{value:.3f}")
            return f"{capitalised(ahead)} beats {behind} on {title} by {by:.3f} ({spans})."
        spans = self._spans(behind_first, signed)
        if by < 5e-4:
            return f"{capitalised(ahead)} and {behind} score the same on {title} ({spans})."
        what = "cells" if self.donors is None else "cells and donors"
        includes = "the interval includes zero" if self.donors is None else "an interval includes zero"
        return (
            f"{capitalised(ahead)} is {by:.3f} ahead of {behind} on {title}, but {includes} ({spans}): "
            f"these {what} do not tell the two apart."
        )

    def _spans(self, turned: bool, written: Callable[[float], str]) -> str:
        spans = [f"95% interval {_span(self.interval, turned, written)}"]
        if self.donors is not None:
            spans.append(f"over {self.donors.units} donors {_span(self.donors, turned, written)}")
        return ", ".join(spans)


def _span(interval: Interval, turned: bool, written: Callable[[float], str]) -> str:
    low, high = (-interval.high, -interval.low) if turned else (interval.low, interval.high)
    return f"{written(low)} to {written(high)}"


def signed(value: float) -> str:
    """Return a number with its sign, typographic minus, three decimals; zero has no sign."""
    text = f"{abs(value):.3f}"
    if float(text) == 0:
        return text
    return f"+{text}" if value > 0 else f"−{text}"


def capitalised(name: str) -> str:
    """Return a name fit to open a sentence; a first word with capitals of its own (kNN, scGPT) stays as it is."""
    first = name.replace("-", " ").split(" ")[0]
    return name if first != first.lower() else name[:1].upper() + name[1:]


def against_best_baseline(comparison: Comparison, model: str, metric: str) -> Difference | None:
    """Compare a model with the baseline of the best mean score, by paired bootstraps over held-out cells and donors.

    Over cells, they are exchanged within types. None where the metric of this task cannot be resampled.
    Raises ScfmError where the comparison holds no baseline that came to an end.
    """
    baseline = comparison.best(metric, "baseline")
    if baseline is None:
        raise ScfmError("no baseline to compare with")
    mine, theirs = comparison.runs_of(model), comparison.runs_of(baseline)
    scores: list[list[Resampled]] = []
    for runs in (mine, theirs):
        made = [comparison.protocol.resampled(comparison, run, metric) for run in runs]
        scores.append([one for one in made if one is not None])
    if len(scores[0]) < len(mine) or len(scores[1]) < len(theirs):
        return None
    held_out = [split.test for split in comparison.splits]
    strata = [comparison.truth[test] for test in held_out]
    interval = paired_bootstrap(scores[0], scores[1], held_out, strata=strata)
    by_donor = None
    if (donors := comparison.cells.donors) is not None and not comparison.cells.donors_are_types:
        of_split = [donors[test] for test in held_out]
        if len(np.unique(np.concatenate(of_split))) > 1:
            by_donor = paired_bootstrap(scores[0], scores[1], held_out, donors=of_split)
    sign = 1 if METRICS[metric].higher_is_better else -1
    ahead = sum(sign * a.values[metric] > sign * b.values[metric] for a, b in zip(mine, theirs, strict=True))
    return Difference(model, baseline, metric, interval, ahead, len(mine), by_donor)


def differences(comparison: Comparison) -> list[Difference]:
    """Return every model that failed on no split against the best baseline, on every headline metric."""
    silent = uninformative(comparison)
    found = [
        against_best_baseline(comparison, model, metric)
        for model in comparison.ranked("model")
        for metric in comparison.protocol.headline
    ]
    return [replace(one, silent=one.metric in silent) for one in found if one is not None]


def anchored(comparison: Comparison, method: str, metric: str) -> float | None:
    """Return where a mean score lies between the controls: 0 the best that knows nothing, 1 the best that knows all.

    None where it is not defined, or no positive control is ahead of the negative ones.
    """
    best, worst = comparison.best(metric, "positive control"), comparison.best(metric, "negative control")
    if best is None or worst is None:
        return None
    at, top, bottom = (comparison.summary(name, metric).mean for name in (method, best, worst))
    reach = (top - bottom) * (1 if METRICS[metric].higher_is_better else -1)
    return None if reach <= 0 or np.isnan(at) else float((at - bottom) / (top - bottom))


def uninformative(comparison: Comparison) -> dict[str, str]:
    """Return metric -> why it says nothing here: a control that must lose does as well as the best method, or better.

    All models and baselines are asked: where only the models fall behind a control, it is they that are bad. Nor does a
    metric say anything by which what knows the answer is no better than what knows nothing.
    """
    found = {}
    for metric in (*comparison.protocol.metrics, *comparison.protocol.further):
        best = comparison.best(metric, "model", "baseline")
        control = comparison.best(metric, "negative control")
        if best is None or control is None:
            continue
        sign = 1 if METRICS[metric].higher_is_better else -1
        ours, theirs = comparison.summary(best, metric).mean, comparison.summary(control, metric).mean
        if sign * theirs >= sign * ours:
            found[metric] = (
                f"{capitalised(METRICS[metric].title)} says nothing here: {control}, a negative control, scores "
                f"{theirs:.3f}, the best method ({best}) {ours:.3f}."
            )
            continue
        known = comparison.best(metric, "positive control")
        if known is not None and sign * (top := comparison.summary(known, metric).mean) <= sign * theirs:
            found[metric] = (
                f"{capitalised(METRICS[metric].title)} says nothing here: {known}, which knows the answer, scores "
                f"{top:.3f}, and {control}, a negative control, {theirs:.3f}."
            )
    return found


def beaten_by_controls(comparison: Comparison) -> list[str]:
    """Say which models are no better than a negative control on a headline metric that does say something."""
    silent, said = uninformative(comparison), []
    for model in comparison.ranked("model"):
        for metric in comparison.protocol.headline:
            control = comparison.best(metric, "negative control")
            if metric in silent or control is None:
                continue
            sign = 1 if METRICS[metric].higher_is_better else -1
            ours, theirs = comparison.summary(model, metric).mean, comparison.summary(control, metric).mean
            if sign * theirs >= sign * ours:
                said.append(
                    f"{capitalised(model)} is no better than {control} on {METRICS[metric].title} "
                    f"({ours:.3f} against {theirs:.3f})."
                )
    return said


def leaked(comparison: Comparison, method: str) -> bool:
    """Say whether a method was trained on something that it is judged on, in any split."""
    return any(run.leakage is not None and run.leakage.any for run in comparison.runs if run.method == method)


def leakage_in_words(comparison: Comparison, model: str) -> str:
    """Say how many held-out cells a model was trained on, in its worst split."""
    runs = comparison.runs_of(model)
    counted = [run.leakage for run in runs if run.leakage is not None]
    if len(counted) < len(runs) or not counted:
        return f"{capitalised(model)} does not say which cells it was trained on: leakage is not ruled out."
    worst = max(counted, key=lambda one: (one.seen / one.cells, len(one.datasets), len(one.donors)))
    if worst.any:
        return f"† {capitalised(model)} was trained on held-out cells: {worst}. Its scores are not held-out scores."
    return f"No held-out cell was among those that {model} was trained on, pretraining included."


def caveats(comparison: Comparison) -> list[str]:
    """Return what a reader must know before believing the scores: failures, seeds, leakage, what says nothing."""
    said = [f"{capitalised(name)} {why}." for name in comparison.kinds if (why := comparison.failure(name))]
    if failed := [name for name in comparison.names("baseline") if comparison.failure(name)]:
        said.append(f"The best baseline may be better than shown: {', '.join(failed)} did not come to an end.")
    if len(comparison.splits) == 1:
        said.append("One seed only: the scores have no spread, and a difference may be luck of the seed.")
    if comparison.protocol.transductive:
        said.append(
            "Transductive: every method saw all these cells, never their labels, while it was fitted. There is no "
            "held-out set, so compare only with other transductive scores on the same cells."
        )
    said += [leakage_in_words(comparison, model) for model in comparison.ranked("model")]
    if comparison.duplicates is not None and any(one.seen for one in comparison.duplicates):
        worst = max(comparison.duplicates, key=lambda one: one.seen)
        said.append(f"Training and held-out cells share identical profiles: {worst}.")
    said += [*uninformative(comparison).values(), *beaten_by_controls(comparison)]
    if comparison.cells.donors_are_types:
        said.append(
            f"No intervals over donors: {comparison.cells.donor} divides the cells just as {comparison.label} does, so "
            "to draw donors would be to draw types."
        )
    elif comparison.cells.donors is not None:
        n = len(np.unique(comparison.cells.donors[np.concatenate([split.test for split in comparison.splits])]))
        if n == 1:
            said.append("All held-out cells are of one donor: nothing is known of how scores vary between donors.")
        elif n < FEW_DONORS:
            said.append(f"Only {n} donors: an interval over so few is a rough one, and rather too narrow.")
    return said + comparison.protocol.caveats(comparison)
