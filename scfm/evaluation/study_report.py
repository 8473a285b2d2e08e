"""Print and write what a study found: tables, study.json, study.html; never without the baselines."""

from __future__ import annotations

import math
import os
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scfm.data.building.directory import write_json
from scfm.errors import ScfmError
from scfm.evaluation import study_plots
from scfm.evaluation.metrics import METRICS
from scfm.evaluation.page import Figure, definitions, document, figure_html, items, origin_of
from scfm.evaluation.provenance import provenance
from scfm.evaluation.study_design import INIT, INITS
from scfm.evaluation.study_results import Sensitivity, Study
from scfm.evaluation.verdict import capitalised, differences, signed

if TYPE_CHECKING:
    from rich.console import Console

JSON, PAGE = "study.json", "study.html"
MOST_ROWS = 20  # configurations of a printed table, the best of them; all are in study.json and on the page


def require_baselines(study: Study) -> None:
    """Raise ScfmError unless a baseline came to an end on every seed; one that failed is a row with its reason."""
    if study.best(study.baselines) is None:
        reasons = "; ".join(f"{name} {study.failure(name)}" for name in study.baselines) or "none was run"
        raise ScfmError(f"no report: every baseline failed ({reasons})")


def print_study(study: Study, console: Console | None = None) -> None:
    """Print scores on validation cells, sensitivities, what was chosen of how many, and what to keep in mind."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape as plain
    from rich.table import Table

    require_baselines(study)
    console = console or Console()
    metrics = study.plan.protocol.terminal
    n = len(study.plan.splits)
    seeds = f"{n} seeds" if n > 1 else "1 seed, so no spread"
    style: dict[str, Any] = {"title_justify": "left", "box": SIMPLE_HEAD, "pad_edge": False}
    table = Table(title=f"{study.plan.study.task} study: validation cells, {seeds}", **style)
    table.add_column("configuration", overflow="fold")
    for metric in metrics:
        table.add_column(METRICS[metric].title, justify="right", no_wrap=True)
    table.add_column("seconds", justify="right")
    shown = shown_configurations(study)
    for name in [*shown, *study.baselines]:
        reason, bold = row_reason(study, name), name == study.chosen
        scores = [str(study.summary(name, metric)) for metric in metrics] if reason is None else ["–"] * len(metrics)
        said = plain(name) if reason is None else f"{plain(name)} [dim]({plain(reason)})[/]"
        seconds = "–" if reason else f"{mean_seconds(study, name):,.1f}"
        end = name in (shown[-1], study.baselines[-1])
        table.add_row(said, *scores, seconds, style="bold" if bold else None, end_section=end)
    console.print(table)
    if hidden := len(study.plan.configurations) - len(shown):
        console.print(f"… and {hidden:,} configurations that scored lower or not at all: see {JSON}", highlight=False)
    ranks = Table(title=f"sensitivity of {METRICS[study.main].title}, validation cells", **style)
    for head in ("rank", "key", "range", "p", "best", "levels"):
        ranks.add_column(head, justify="right" if head in ("rank", "range", "p") else "left", overflow="fold")
    for rank, one in study.ranked():
        levels = "  ".join(f"{level}: {mean:.3f}" for level, mean in levels_of(one))
        ranks.add_row(
            f"{rank}", plain(one.factor), f"{one.range:.3f}", probability(one), plain(one.best), plain(levels)
        )
    if study.plan.factors:
        console.print(ranks)
    console.print(verdict(study), markup=False, highlight=False)
    for caveat in caveats(study):
        console.print(f"Note: {caveat}", style="yellow", markup=False, highlight=False)


def shown_configurations(study: Study) -> list[str]:
    """Return the configurations of a printed table: all of them in order, of many the best and the default."""
    names = [one.name for one in study.plan.configurations]
    if len(names) <= MOST_ROWS:
        return names
    sign = 1 if METRICS[study.main].higher_is_better else -1
    scored = [name for name in study.tried if not math.isnan(study.summary(name, study.main).mean)]
    best = sorted(scored, key=lambda name: -sign * study.summary(name, study.main).mean)[:MOST_ROWS]
    return best if study.default in best else [*best, study.default]


def row_reason(study: Study, name: str) -> str | None:
    """Return why a configuration has no score: it cannot be tried, or failed; None where it has."""
    for one in study.plan.configurations:
        if one.name == name and one.reason is not None:
            return f"not applicable: {one.reason}"
    return study.failure(name)


def mean_seconds(study: Study, name: str) -> float:
    """Return the mean wall time of a configuration or a baseline, over the seeds that came to an end."""
    ended = [one["seconds"] for one in study.results if one["method"] == name and not one["failure"]]
    return sum(ended) / len(ended)


def levels_of(one: Sensitivity) -> list[tuple[str, float]]:
    """Return the levels of a key, each with its mean score."""
    return list(zip(one.levels, one.means, strict=True))


def probability(one: Sensitivity) -> str:
    """Return the p of a sensitivity as tables write it."""
    if one.p is None:
        return "–"
    return "< 0.001" if one.p < 0.001 else f"{one.p:.3f}"


def verdict(study: Study) -> str:
    """Say what was chosen of how many configurations, and how it stands to default and baselines."""
    chosen, default = (study.summary(name, study.main).mean for name in (study.chosen, study.default))
    baseline = study.best(study.baselines)
    assert baseline is not None
    theirs = study.summary(baseline, study.main).mean
    by = f"chosen by {METRICS[study.main].title} on validation cells"
    return (
        f"{counted(len(study.tried))} tried; {by}: {study.chosen}, {chosen:.3f} "
        f"({signed(chosen - default)} to the default, {signed(chosen - theirs)} to {baseline}, the best baseline)."
    )


def counted(n: int) -> str:
    """Return so many configurations in words."""
    return f"{n:,} configuration{'' if n == 1 else 's'}"


def caveats(study: Study) -> list[str]:
    """Return what a reader must know before believing the scores."""
    plan, said = study.plan, []
    not_applicable = sum(one.reason is not None for one in plan.configurations)
    failed = [name for name in study.tried if study.failure(name)]
    if len(study.tried) > 1:
        said.append(
            f"The chosen configuration is the best of {len(study.tried):,}, so its validation score is too good; its "
            "score on the test cells, which nothing was chosen by, is not. Baselines were not tuned."
        )
    if not_applicable:
        said.append(f"Not applicable, for the reasons in their rows: {counted(not_applicable)}.")
    if failed:
        said.append(f"Failed, and cannot be chosen: {counted(len(failed))} ({', '.join(failed)}).")
    said += [f"{capitalised(name)} {why}." for name in study.baselines if (why := study.failure(name))]
    if len(plan.splits) == 1:
        said.append("One seed only: what a key changes cannot be told from luck of the seed.")
    elif plan.factors:
        said.append(
            f"p is how often the means of {len(plan.splits)} seeds would lie as far apart if the key did nothing, each "
            "key by itself; of many keys some look large by chance. Cells are held fixed."
        )
    if plan.study.design == "one_at_a_time" and len(plan.factors) > 1:
        said.append("One key was changed at a time: nothing is known of how keys act together (design: grid).")
    if unranked := study.unranked():
        said.append(f"Without a rank, because fewer than two of their levels came to an end: {', '.join(unranked)}.")
    if plan.question.reference is not None:
        said.append("Validation cells are of the reference: what is best there need not be best on other data.")
    if len(study.tested) > 1:
        said.append(
            f"Test cells were scored {len(study.tested)} times, as the recipe of the study grew: the last score "
            "has been chosen by a little too."
        )
    if len(commits := {one["commit"] for one in study.results}) > 1:
        said.append(f"The runs were made by {len(commits)} versions of scfm.")
    return said


def write_study(study: Study, title: str) -> Path:
    """Write study.json and study.html into the folder of the study; return the path of the page.

    Raises ScfmError where every baseline failed.
    """
    require_baselines(study)
    origin = provenance()
    folder = study.plan.folder
    page = folder / f"{PAGE}.tmp"
    page.write_text(page_of(study, title, origin), encoding="utf-8")
    os.replace(page, folder / PAGE)
    write_json(folder / JSON, content_of(study, title, origin))
    return folder / PAGE


def content_of(study: Study, title: str, origin: dict[str, Any]) -> dict[str, Any]:
    """Return the content of study.json: the question, every configuration, every run, what follows from them."""
    plan = study.plan
    names = plan.tuning.adata.obs_names.tolist()
    return {
        "title": title,
        "task": plan.study.task,
        "study": vars(plan.study),
        "question": vars(plan.question),
        "chosen_by": f"mean {study.main} over seeds, validation cells",
        "configurations_tried": len(study.tried),
        "chosen": study.chosen,
        "verdict": verdict(study),
        "factors": [
            {"name": one.name, "levels": one.levels, "default": one.levels[one.default]} for one in plan.factors
        ],
        "configurations": [
            {
                "name": one.name,
                "levels": {factor.name: factor.levels[k] for factor, k in zip(plan.factors, one.levels, strict=True)},
                "not_applicable": one.reason,
                "failure": study.failure(one.name),
                "recipe": one.recipe.to_dict(),
            }
            for one in plan.configurations
        ],
        "splits": [
            {"seed": one.seed, "protocol": one.protocol, "train": len(one.train), "validation": len(one.test)}
            | {"sha256": one.hash(names)}
            for one in plan.splits
        ],
        "outer": {"protocol": plan.outer.protocol, "tuning": len(plan.outer.train), "test": len(plan.outer.test)},
        "runs": study.results,
        "sensitivity": [{"rank": rank} | vars(one) for rank, one in study.ranked()],
        "tested": study.tested,
        "caveats": caveats(study),
        **origin,
    }


def page_of(study: Study, title: str, origin: dict[str, Any]) -> str:
    """Return the page: verdict, tables, caveats, figures, what the settings mean, provenance."""
    plan = study.plan
    figures = "".join(figure_html(k, one) for k, one in enumerate(figures_of(study), start=1))
    byline = (
        f"{capitalised(plan.protocol.question)}. {len(plan.tuning.truth):,} cells to train and choose on, "
        f"{len(plan.outer.test):,} test cells ({escape(plan.outer.protocol)}), {len(plan.splits)} seeds; every "
        "configuration and baseline on the same cells."
    )
    lines = f"<p>{escape(verdict(study))}</p>"
    if study.test is not None:
        lines += "".join(f"<p>Test cells: {escape(str(one))}</p>" for one in differences(study.test))
    lines += '<p><a href="test/report.html">Scores on the test cells</a></p>'
    settings = {name.replace("_", " "): escape(what) for name, (_, _, what) in INITS.items()}
    used = any(factor.name == INIT for factor in plan.factors)
    return document(
        title,
        f'<h1>{escape(title)}</h1><p class="byline">{byline}</p>\n<div class="verdict">{lines}</div>\n'
        f"{_scores(study)}\n{_ranks(study)}\n"
        f"<h2>Read with care</h2><ul>{items(caveats(study))}</ul>\n{figures}\n"
        + (f"<h2>Initial settings</h2>{definitions(settings)}\n" if used else "")
        + f"<h2>Provenance</h2>{definitions(origin_of(origin))}\n",
    )


def _scores(study: Study) -> str:
    metrics = study.plan.protocol.metrics
    head = "".join(f"<th>{capitalised(METRICS[metric].title)}</th>" for metric in metrics)

    def row(name: str, kind: str) -> str:
        if (reason := row_reason(study, name)) is not None:
            why = f'<td class="failed" colspan="{len(metrics)}">{escape(reason)}</td>'
            return f'<tr><td class="{kind}">{escape(name)}</td>{why}</tr>'
        scores = "".join(f"<td>{study.summary(name, metric)}</td>" for metric in metrics)
        return f'<tr><td class="{kind}">{escape(name)}</td>{scores}</tr>'

    bodies = ""
    for heading, names in (
        ("Configurations; the chosen one in colour", [one.name for one in study.plan.configurations]),
        ("Baselines", study.baselines),
    ):
        rows = "".join(row(name, "model" if name == study.chosen else "baseline") for name in names)
        first = f'<tr class="kind"><td colspan="{len(metrics) + 1}">{heading}</td></tr>'
        bodies += f'<tbody class="group">{first}{rows}</tbody>'
    caption = "<b>Table 1. Scores on validation cells.</b> Mean ± standard deviation over seeds."
    return (
        f'<div class="scroll"><table><caption>{caption}</caption><thead><tr><th>Configuration</th>{head}</tr></thead>'
        f"{bodies}</table></div>"
    )


def _ranks(study: Study) -> str:
    ranked = study.ranked()
    if not ranked:
        return ""
    lines = "".join(
        f'<tr><td>{rank}</td><td class="text">{escape(one.factor)}</td><td>{one.range:.3f}</td>'
        f'<td>{escape(probability(one))}</td><td class="text">{escape(one.best)}</td>'
        f'<td class="text">{"; ".join(f"{escape(level)}: {mean:.3f}" for level, mean in levels_of(one))}</td></tr>'
        for rank, one in ranked
    )
    caption = (
        f"<b>Table 2. Sensitivity.</b> Keys by the range of mean {METRICS[study.main].title} over their levels, all "
        "other keys alike; p by Tukey's studentised range over paired seeds."
    )
    heads = '<th>Rank</th><th class="text">Key</th><th>Range</th><th>p</th><th class="text">Best</th>'
    return (
        f'<div class="scroll"><table><caption>{caption}</caption><thead><tr>{heads}'
        f'<th class="text">Level: mean</th></tr>'
        f"</thead><tbody>{lines}</tbody></table></div>"
    )


def figures_of(study: Study) -> list[Figure]:
    """Draw the figures of a study: sensitivities and changes where two levels ended, pairs of keys for a grid."""
    ranked = study.sensitivities()
    if not ranked:
        return []
    title = METRICS[study.main].title
    drawn = [
        Figure(
            study_plots.sensitivity(study),
            "Sensitivity",
            f"Mean {title} on validation cells by the level of each key, all other keys alike; dashed the default, "
            "dotted the best baseline.",
        ),
        Figure(
            study_plots.effects(study),
            "What each level changes",
            "Mean difference to the default's level on validation cells, over seeds and settings of all other keys; "
            "blue is better, red is worse.",
        ),
    ]
    if study.plan.study.design == "grid" and len(ranked) > 1:
        drawn.append(
            Figure(
                study_plots.pairs(study),
                "Pairs of keys",
                f"Mean {title} on validation cells over seeds and settings of the other keys, the same ones for all "
                "cells of a map.",
            )
        )
    return drawn
