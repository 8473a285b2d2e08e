"""What the scores say, in words: who wins, by how much, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass

from scfm.errors import ScfmError
from scfm.evaluation.bootstrap import Interval, paired_bootstrap
from scfm.evaluation.harness import Comparison
from scfm.evaluation.metrics import FROM_CONFUSION, METRICS, confusion_codes

HEADLINE = ("macro_f1", "accuracy")


@dataclass(frozen=True)
class Difference:
    """A model against the best baseline on one metric: positive where the model is ahead."""

    model: str
    baseline: str
    metric: str
    interval: Interval
    seeds_ahead: int
    seeds: int

    @property
    def outcome(self) -> str:
        """`model`, `baseline`, or `undecided` where the interval includes zero."""
        if self.interval.low > 0:
            return "model"
        return "baseline" if self.interval.high < 0 else "undecided"

    def __str__(self) -> str:
        low, high = self.interval.low, self.interval.high
        if self.interval.difference < 0:
            ahead, behind, low, high = self.baseline, self.model, -high, -low
        else:
            ahead, behind = self.model, self.baseline
        title, by = METRICS[self.metric].title, abs(self.interval.difference)
        if self.outcome != "undecided":
            return f"{capitalised(ahead)} beats {behind} on {title} by {by:.3f} (95% interval {low:.3f} to {high:.3f})."
        span = f"95% interval {signed(low)} to {signed(high)}"
        if by < 5e-4:
            return f"{capitalised(ahead)} and {behind} score the same on {title} ({span})."
        return (
            f"{capitalised(ahead)} is {by:.3f} ahead of {behind} on {title}, but the interval includes zero ({span}): "
            "these cells do not tell the two apart."
        )


def signed(value: float) -> str:
    """Return a number with its sign, typographic minus, three decimals; zero has no sign."""
    text = f"{abs(value):.3f}"
    if float(text) == 0:
        return text
    return f"+{text}" if value > 0 else f"−{text}"


def capitalised(name: str) -> str:
    """Return a name fit to open a sentence; names that carry capitals of their own (kNN, scGPT) stay as they are."""
    return name if name != name.lower() else name[:1].upper() + name[1:]


def against_best_baseline(comparison: Comparison, model: str, metric: str) -> Difference:
    """Compare a model with the baseline of the best mean score, by a paired bootstrap over held-out cells within types.

    Raises ScfmError where the comparison holds no baseline.
    """
    baseline = comparison.best("baseline", metric)
    if baseline is None:
        raise ScfmError("no baseline to compare with")
    labels = comparison.labels
    mine, theirs = comparison.runs_of(model), comparison.runs_of(baseline)
    held_out = [split.test for split in comparison.splits]
    codes = [
        [
            confusion_codes(comparison.truth[test], run.predicted, labels)
            for run, test in zip(runs, held_out, strict=True)
        ]
        for runs in (mine, theirs)
    ]
    interval = paired_bootstrap(
        codes[0],
        codes[1],
        held_out,
        len(labels),
        FROM_CONFUSION[metric],
        strata=[comparison.truth[test] for test in held_out],
    )
    ahead = sum(a.scores.values[metric] > b.scores.values[metric] for a, b in zip(mine, theirs, strict=True))
    return Difference(model, baseline, metric, interval, ahead, len(mine))


def differences(comparison: Comparison) -> list[Difference]:
    """Return every model against the best baseline, on every headline metric."""
    return [
        against_best_baseline(comparison, model, metric) for model in comparison.names("model") for metric in HEADLINE
    ]


def leakage_in_words(comparison: Comparison, model: str) -> str:
    """Say how many held-out cells a model was trained on, in its worst split."""
    runs = comparison.runs_of(model)
    counted = [run.leakage for run in runs if run.leakage is not None]
    if len(counted) < len(runs):
        return f"{capitalised(model)} does not say which cells it was trained on: leakage is not ruled out."
    worst = max(counted, key=lambda one: one.seen / one.cells)
    if worst.seen:
        return f"{capitalised(model)} was trained on held-out cells: {worst}. Its scores are not held-out scores."
    return f"No held-out cell was among those that {model} was trained on, pretraining included."


def caveats(comparison: Comparison) -> list[str]:
    """Return what a reader must know before believing the scores: seeds, leakage, duplicates, types left out."""
    said = []
    if len(comparison.splits) == 1:
        said.append("One seed only: the scores have no spread, and a difference may be luck of the seed.")
    said += [leakage_in_words(comparison, model) for model in comparison.names("model")]
    if comparison.duplicates is not None and any(one.seen for one in comparison.duplicates):
        worst = max(comparison.duplicates, key=lambda one: one.seen)
        said.append(f"Training and held-out cells share identical profiles: {worst}.")
    if comparison.excluded:
        said.append(f"Not scored, because never held out: {', '.join(comparison.excluded)}.")
    rare = [name for name, n in zip(comparison.labels, comparison.support, strict=True) if n < 20]
    if rare:
        said.append(f"Fewer than 20 cells in all, so their F1 moves in large steps: {', '.join(rare)}.")
    for name in comparison.kinds:
        outside = sum(int(run.scores.confusion[:, -1].sum()) for run in comparison.runs_of(name))
        if outside:
            said.append(f"{capitalised(name)} gave {outside:,} cells a label outside the list; they count as errors.")
    return said
