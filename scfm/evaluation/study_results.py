"""What the runs of a study say: scores by configuration, which one is chosen, and which keys matter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scfm.errors import ScfmError
from scfm.evaluation.harness import Comparison, Summary
from scfm.evaluation.metrics import METRICS
from scfm.evaluation.study_runs import Plan

ALIKE = 1e-10  # means that are closer differ by rounding


@dataclass(frozen=True)
class Marginal:
    """Scores by the level of one factor, all others alike.

    Attributes:
        levels: indices of those levels that were tried and came to an end.
        scores: (levels, seeds), averaged over the settings of the other factors.
        settings: how many settings of the other factors have all of these levels on all seeds.
    """

    levels: list[int]
    scores: NDArray[np.float64]
    settings: int


@dataclass(frozen=True)
class Sensitivity:
    """How much one factor moves the score by which configurations are chosen.

    Attributes:
        factor: its name.
        levels: of the tried levels, how tables write them.
        means: mean score of each.
        best: the best of them, a dash where all are alike.
        range: the best mean minus the worst.
        p: how often the range would be as large if the factor did nothing (Tukey's studentised range over levels and
            paired seeds); None with one seed or one level.
        settings: how many settings of the other factors the means are over.
    """

    factor: str
    levels: list[str]
    means: list[float]
    best: str
    range: float
    p: float | None
    settings: int


@dataclass(frozen=True)
class Study:
    """A finished study.

    Attributes:
        plan: what was asked, and how.
        results: one per run of a model or a baseline, scored on validation cells.
        test: the chosen and the default configuration on the test cells, beside baselines and controls; None where
            they had been scored before.
        tested: what was chosen and scored on the test cells so far, in this order: name, and key of its runs.
    """

    plan: Plan
    results: list[dict[str, Any]]
    test: Comparison | None = None
    tested: list[dict[str, str]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no run failed."""
        return not any(one["failure"] for one in self.results) and (self.test is None or self.test.passed)

    @property
    def main(self) -> str:
        """The metric by which configurations are chosen."""
        return self.plan.protocol.main

    @cached_property
    def _found(self) -> dict[str, list[dict[str, Any]]]:
        found = defaultdict(list)
        for one in self.results:
            found[one["method"]].append(one)
        return found

    @property
    def baselines(self) -> list[str]:
        """Names of the baselines."""
        return list(dict.fromkeys(one["method"] for one in self.results if one["kind"] == "baseline"))

    @property
    def tried(self) -> list[str]:
        """Names of the configurations that were tried."""
        return [one.name for one in self.plan.configurations if one.reason is None]

    def failure(self, name: str) -> str | None:
        """Return why a configuration or a baseline failed, on the first seed where it did, or None."""
        failed = [one for one in self._found[name] if one["failure"]]
        if not failed:
            return None
        seeds = ", ".join(str(one["seed"]) for one in failed)
        of = "" if len(failed) == len(self.plan.splits) else f" (seed {seeds})"
        return f"failed{of}: {failed[0]['failure']}"

    def values(self, name: str, metric: str) -> NDArray[np.float64]:
        """Return (seeds,) validation scores of a configuration or a baseline; NaN where it failed or has none."""
        values = np.full(len(self.plan.splits), np.nan)
        for one in self._found[name]:
            value = one["values"].get(metric)
            values[one["seed"]] = np.nan if value is None else value
        return values

    def summary(self, name: str, metric: str) -> Summary:
        """Return mean and standard deviation of a validation score over the seeds that came to an end."""
        values = self.values(name, metric)
        values = values[~np.isnan(values)]
        if not len(values):
            return Summary(float("nan"), None, 0)
        return Summary(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None, len(values))

    def best(self, names: Sequence[str]) -> str | None:
        """Return which has the best mean validation score of those that failed on no seed; the first of equals."""
        sign = 1 if METRICS[self.main].higher_is_better else -1
        scored = [one for one in names if not np.isnan(self.values(one, self.main)).any()]
        return max(scored, key=lambda name: sign * self.values(name, self.main).mean(), default=None)

    @property
    def chosen(self) -> str:
        """The configuration with the best mean validation score. Raises ScfmError where none came to an end."""
        best = self.best(self.tried)
        if best is None:
            reasons = "; ".join(dict.fromkeys(str(self.failure(name)) for name in self.tried))
            raise ScfmError(f"no configuration came to an end on every seed ({reasons}); --retry makes them again")
        return best

    @property
    def default(self) -> str:
        """The configuration around which all varies."""
        return self.plan.configurations[0].name

    def marginal(self, factor: int, metric: str) -> Marginal:
        """Return scores by the level of a factor, over the settings of all others that have each of these levels."""
        scores: dict[tuple[int, ...], dict[int, NDArray[np.float64]]] = defaultdict(dict)
        for one in self.plan.configurations:
            values = self.values(one.name, metric)
            if one.reason is None and not np.isnan(values).any():
                others = (*one.levels[:factor], *one.levels[factor + 1 :])
                scores[others][one.levels[factor]] = values
        levels = sorted({level for group in scores.values() for level in group})
        whole = [group for group in scores.values() if len(group) == len(levels)]
        if len(levels) < 2 or not whole:
            return Marginal([], np.empty((0, len(self.plan.splits))), 0)
        means = np.mean([[group[level] for level in levels] for group in whole], axis=0)
        return Marginal(levels, means, len(whole))

    def sensitivities(self) -> list[Sensitivity]:
        """Return how much each factor moves the main validation score, the most first."""
        found = []
        sign = 1 if METRICS[self.main].higher_is_better else -1
        for k, factor in enumerate(self.plan.factors):
            marginal = self.marginal(k, self.main)
            if not marginal.levels:
                continue
            means = marginal.scores.mean(axis=1)
            shown = [factor.shown(level) for level in marginal.levels]
            spread = float(means.max() - means.min())
            best = shown[int((sign * means).argmax())] if spread > ALIKE else "–"
            p = range_probability(marginal.scores)
            found.append(Sensitivity(factor.name, shown, means.tolist(), best, spread, p, marginal.settings))
        return sorted(found, key=lambda one: -one.range)

    def ranked(self) -> list[tuple[int, Sensitivity]]:
        """Return factors by how much they move the score, each with its rank; equal ones share theirs."""
        found = self.sensitivities()
        return [(1 + sum(other.range > one.range + ALIKE for other in found), one) for one in found]

    def unranked(self) -> list[str]:
        """Return the factors of which less than two levels came to an end."""
        return [factor.name for k, factor in enumerate(self.plan.factors) if not self.marginal(k, self.main).levels]


def range_probability(scores: NDArray[np.float64]) -> float | None:
    """Return the probability of a range of level means this large or larger if all levels were alike.

    Scores (levels, seeds) are those of an additive layout: a seed moves all levels by the same. None with one seed.
    Tukey's studentised range, as in Scheffe 1959, chapter 3.
    """
    from scipy.stats import studentized_range

    n_levels, n_seeds = scores.shape
    if n_seeds < 2 or n_levels < 2:
        return None
    means = scores.mean(axis=1)
    residuals = scores - means[:, None] - scores.mean(axis=0) + scores.mean()
    freedom = (n_levels - 1) * (n_seeds - 1)
    error = float((residuals**2).sum() / freedom)
    spread = float(means.max() - means.min())
    if error < 1e-20:  # equal on all seeds: scores of few cells are often just that
        return 1.0 if spread < ALIKE else 0.0
    return float(studentized_range.sf(spread / np.sqrt(error / n_seeds), n_levels, freedom))
