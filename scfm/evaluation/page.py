"""The report as one self-contained HTML page: no script, no network, figures inlined."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import isnan
from typing import TYPE_CHECKING, Any

from scfm.evaluation.metrics import METRICS
from scfm.evaluation.verdict import Difference, anchored, capitalised, leaked, signed, uninformative

if TYPE_CHECKING:
    from scfm.evaluation.harness import Comparison, Run, Summary
    from scfm.evaluation.protocol import Kind

STYLE = """
:root { color-scheme: light; --ink: #1d2433; --faint: #6b7280; --rule: #d9dde3; --model: #c2410c; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 15px/1.55 Inter, "Helvetica Neue", Helvetica, Arial,
  "Liberation Sans", sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 940px; margin: 0 auto; padding: 56px 28px 72px; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 6px; }
h2 { font-size: 16px; margin: 48px 0 10px; }
p { margin: 0 0 10px; }
.byline { color: var(--faint); margin-bottom: 28px; }
.verdict { border-left: 3px solid var(--model); padding: 2px 0 2px 18px; margin: 0 0 34px; }
.verdict p { font-size: 17px; line-height: 1.5; margin: 0 0 4px; text-wrap: pretty; }
ul { margin: 0; padding-left: 18px; } li { margin-bottom: 4px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; line-height: 1.4;
  border-top: 1.5px solid var(--ink); border-bottom: 1.5px solid var(--ink); }
th, td { padding: 6px 0 6px 14px; text-align: right; vertical-align: baseline; white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
th.text, td.text { text-align: left; padding-left: 30px; }
thead th { font-weight: 600; border-bottom: 0.75px solid var(--ink); vertical-align: bottom; white-space: normal; }
tbody.group + tbody.group tr:first-child td { border-top: 0.75px solid var(--rule); }
td small { color: var(--faint); font-size: 11.5px; }
td.model { font-weight: 600; color: var(--model); }
tr.control td { color: var(--faint); }
td.failed { text-align: left; white-space: normal; color: var(--faint); }
th small { display: block; font-weight: 400; color: var(--faint); font-size: 11.5px; }
tr.kind td { padding-top: 10px; font-size: 11.5px; color: var(--faint); }
.best { font-weight: 700; }
caption, figcaption { font-size: 13px; line-height: 1.5; color: var(--faint); text-align: left; }
caption { caption-side: top; padding-bottom: 8px; } caption b, figcaption b { color: var(--ink); }
.scroll { overflow-x: auto; margin-bottom: 30px; }
figure { margin: 34px 0 0; break-inside: avoid; } figure img { display: block; width: 100%; }
figcaption { margin-top: 8px; }
dl { display: grid; grid-template-columns: 148px 1fr; gap: 5px 16px; margin: 0; font-size: 13.5px; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: 12px ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; }
@media print { main { max-width: none; padding: 0; } body { font-size: 11pt; } h2 { break-after: avoid; } }
@page { margin: 20mm 18mm; }
"""


MOST_ABREAST = 6  # columns with the spread beside the mean; of more it stands beneath


@dataclass(frozen=True)
class Figure:
    """A picture of the report: PNG bytes, a caption title, and what the reader sees."""

    png: bytes
    title: str
    caption: str


def render(
    comparison: Comparison,
    title: str,
    differences: Sequence[Difference],
    caveats: Sequence[str],
    figures: Sequence[Figure],
    origin: dict[str, Any],
) -> str:
    """Return the page: verdict, scores, caveats, figures, further tables, methods, provenance, in this order."""
    n_seeds = len(comparison.splits)
    split, protocol = comparison.splits[0], comparison.protocol
    held_out = "" if protocol.transductive else f" ({len(split.test):,} cells)"
    byline = (
        f"{capitalised(protocol.question)}. "
        f"{len(comparison.truth):,} cells, {len(comparison.labels)} types of <code>{escape(comparison.label)}</code>. "
        f"{escape(split.protocol[:1].upper() + split.protocol[1:])}{held_out}, "
        f"{n_seeds} seed{'s' if n_seeds > 1 else ''}; every method on the same splits."
    )
    verdict = "".join(f"<p>{escape(str(one))}</p>" for one in differences) or "<p>Baselines only.</p>"
    notes = f"<h2>Read with care</h2><ul>{items(caveats)}</ul>" if caveats else ""
    pictures = "".join(figure_html(number, figure) for number, figure in enumerate(figures, start=1))
    body = (
        f'<h1>{escape(title)}</h1><p class="byline">{byline}</p>\n<div class="verdict">{verdict}</div>\n'
        f"{_score_table(comparison)}\n{_difference_table(differences, protocol.transductive)}\n{notes}\n{pictures}\n"
        f"<h2>Further tables</h2>{_anchored_table(comparison)}\n{_cost_table(comparison)}\n"
        f"<h2>Methods</h2>{definitions({name: escape(text) for name, text in comparison.descriptions.items()})}\n"
        f"<h2>Scores</h2>{definitions(_metrics(comparison))}\n"
        f"<h2>Provenance</h2>{definitions(_provenance(comparison, origin))}"
    )
    return document(title, body)


def document(title: str, body: str, style: str = "") -> str:
    """Return a whole page in the style of reports, to which a page may add its own."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{STYLE}{style}</style></head><body><main>\n{body}\n</main></body></html>\n"
    )


def items(texts: Sequence[str]) -> str:
    """Return the items of a list; texts are plain text."""
    return "".join(f"<li>{escape(text)}</li>" for text in texts)


def definitions(entries: dict[str, str]) -> str:
    """Return a list of names, plain text, and what is said of each, HTML."""
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{text}</dd>' for name, text in entries.items())}</dl>"


def figure_html(number: int, figure: Figure) -> str:
    """Return a figure with its caption, the picture inlined."""
    picture = base64.b64encode(figure.png).decode()
    return (
        f'<figure><img alt="{escape(figure.title)}" src="data:image/png;base64,{picture}">'
        f"<figcaption><b>Figure {number}. {escape(figure.title)}.</b> {escape(figure.caption)}</figcaption></figure>\n"
    )


def _metrics(comparison: Comparison) -> dict[str, str]:
    listed = (*comparison.protocol.metrics, *comparison.protocol.further)
    return {METRICS[name].title: escape(METRICS[name].protocol) for name in listed}


def _score(summary: Summary, best: bool, beneath: bool) -> str:
    if isnan(summary.mean):
        return "–"
    mean = f'<span class="best">{summary.mean:.3f}</span>' if best else f"{summary.mean:.3f}"
    return mean if summary.sd is None else f"{mean}{'<br>' if beneath else ' '}<small>± {summary.sd:.3f}</small>"


GROUPS: dict[Kind, str] = {
    "model": "Models",
    "baseline": "Baselines",
    "negative control": "Negative controls: they know nothing",
    "positive control": "Positive controls: they know the answer",
}


def _groups(comparison: Comparison, columns: int, cells: Callable[[str], str]) -> str:
    """Return the rows of a table by kind of method; `cells` gives all but the name of a method that did not fail."""
    groups = []
    for kind, heading in GROUPS.items():
        lines = []
        for name in comparison.names(kind):
            why = comparison.failure(name)
            rest = cells(name) if why is None else f'<td class="failed" colspan="{columns}">{escape(why)}</td>'
            mark = " †" if leaked(comparison, name) else ""
            row = ' class="control"' if kind.endswith("control") else ""
            lines.append(f'<tr{row}><td class="{kind.split()[-1]}">{escape(name)}{mark}</td>{rest}</tr>')
        if lines:
            first = f'<tr class="kind"><td colspan="{columns + 1}">{heading}</td></tr>'
            groups.append(f'<tbody class="group">{first}{"".join(lines)}</tbody>')
    return "".join(groups)


def _score_table(comparison: Comparison) -> str:
    n = len(comparison.splits)
    spread = f"Mean ± standard deviation over {n} seeds" if n > 1 else "One seed, so there is no spread"
    where = "Scores, transductive" if comparison.protocol.transductive else "Scores on held-out cells"
    notes = [f"{spread}; best model or baseline of a column in bold."]
    if uninformative(comparison):
        notes.append("Uninformative: a negative control scores at least as well as the best method.")
    if any(leaked(comparison, name) for name in comparison.kinds):
        notes.append("† trained on some of these cells.")
    tables = [_scores_of(comparison, comparison.protocol.metrics, f"<b>Table 1. {where}.</b> {' '.join(notes)}")]
    if comparison.protocol.further:
        tables.append(_scores_of(comparison, comparison.protocol.further, "<b>Table 1, continued.</b> Further scores."))
    return "".join(tables)


def _scores_of(comparison: Comparison, metrics: Sequence[str], caption: str) -> str:
    silent = uninformative(comparison)
    winners = {metric: comparison.best(metric, "model", "baseline") for metric in metrics}
    head = "".join(
        f"<th>{capitalised(METRICS[metric].title)}{'<small>uninformative</small>' if metric in silent else ''}</th>"
        for metric in metrics
    )

    def cells(name: str) -> str:
        scores = {metric: comparison.summary(name, metric) for metric in metrics}
        return "".join(
            f"<td>{_score(score, winners[metric] == name, len(metrics) > MOST_ABREAST)}</td>"
            for metric, score in scores.items()
        )

    return (
        f'<div class="scroll"><table><caption>{caption}</caption><thead><tr><th>Method</th>{head}</tr>'
        f"</thead>{_groups(comparison, len(metrics), cells)}</table></div>"
    )


def _difference_table(differences: Sequence[Difference], transductive: bool) -> str:
    if not differences:
        return ""
    words = {
        "model": "model ahead",
        "baseline": "baseline ahead",
        "undecided": "not told apart",
        "uninformative": "uninformative",
    }
    donors = next((one.donors for one in differences if one.donors), None)

    def over_donors(one: Difference) -> str:
        return f"<td>{signed(one.donors.low)} to {signed(one.donors.high)}</td>" if one.donors else "<td>–</td>"

    lines = "".join(
        f'<tr><td class="model">{escape(one.model)}</td><td class="text">{escape(METRICS[one.metric].title)}</td>'
        f'<td class="text">{escape(one.baseline)}</td><td>{signed(one.interval.difference)}</td>'
        f"<td>{signed(one.interval.low)} to {signed(one.interval.high)}</td>"
        f"{over_donors(one) if donors else ''}"
        f'<td>{one.seeds_ahead} of {one.seeds}</td><td class="text">{words[one.outcome]}</td></tr>'
        for one in differences
    )
    held_out = "" if transductive else "held-out "
    over = f", and over {donors.units} donors and cells within them" if donors else ""
    caption = (
        "<b>Table 2. Difference to the best baseline.</b> Model minus baseline; 95% paired bootstrap interval over "
        f"{differences[0].interval.units:,} distinct {held_out}cells, resampled within types{over}; what was fitted is "
        "held fixed."
    )
    return (
        f'<div class="scroll"><table><caption>{caption}</caption><thead><tr><th>Model</th><th class="text">Score</th>'
        '<th class="text">Best baseline</th><th>Difference</th><th>95% interval, cells</th>'
        f"{'<th>95% interval, donors</th>' if donors else ''}<th>Seeds ahead</th>"
        f'<th class="text">Outcome</th></tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _anchored_table(comparison: Comparison) -> str:
    metrics, silent = comparison.protocol.metrics, uninformative(comparison)
    names = comparison.ranked("model", "baseline")

    def cell(name: str, metric: str) -> str:
        share = None if metric in silent else anchored(comparison, name, metric)
        if share is None:
            return "<td>–</td>"
        if share < -1:
            return "<td>&lt; −1</td>"
        return f"<td>{signed(share) if share < 0 else f'{share:.3f}'}</td>"

    rows = {name: "".join(cell(name, metric) for metric in metrics) for name in names}
    lines = "".join(
        f'<tr><td class="{comparison.kinds[name]}">{escape(name)}</td>{row}</tr>' for name, row in rows.items()
    )
    head = "".join(f"<th>{capitalised(METRICS[metric].title)}</th>" for metric in metrics)
    caption = (
        "<b>Table 3. Between the controls.</b> Mean scores, 0 being the best negative control and 1 the best positive "
        "one; below 0 a method is worse than what knows nothing. A dash where the metric is uninformative."
    )
    return (
        f'<div class="scroll"><table><caption>{caption}</caption><thead><tr><th>Method</th>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _cost_table(comparison: Comparison) -> str:
    n_cells = len(comparison.truth) if comparison.protocol.transductive else len(comparison.splits[0].test)

    def cells(name: str) -> str:
        runs = comparison.runs_of(name)
        fit, predict = (sum(getattr(run, f"seconds_{step}") for run in runs) / len(runs) for step in ("fit", "predict"))
        # a transductive method embeds the cells while it is fitted
        each = (predict or fit) / n_cells * 10_000
        predicting = "–" if comparison.protocol.transductive else _number(predict)
        shown = (_number(fit), predicting, _number(each), _most(runs, "peak_mib"), _most(runs, "parameters"))
        return "".join(f"<td>{value}</td>" for value in shown)

    caption = (
        "<b>Table 4. Cost.</b> Seconds are means over seeds; the peak is the largest, and of the whole process, data "
        "and libraries included."
    )
    heads = ("Fit, s", "Predict, s", "Seconds per 10,000 cells", "Peak, MiB", "Parameters")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return (
        f'<div class="scroll"><table><caption>{caption}</caption><thead><tr><th>Method</th>{head}</tr></thead>'
        f"{_groups(comparison, len(heads), cells)}</table></div>"
    )


def _number(value: float) -> str:
    return f"{value:,.2f}" if value < 10 else f"{value:,.0f}"


def _most(runs: Sequence[Run], what: str) -> str:
    found = [value for run in runs if (value := getattr(run, what)) is not None]
    return f"{max(found):,.0f}" if found else "–"


def _provenance(comparison: Comparison, origin: dict[str, Any]) -> dict[str, str]:
    leakage = {
        f"leakage, {model}": "<br>".join(
            f"seed {run.seed}: {run.leakage or 'not known; the method does not say what it was trained on'}"
            for run in comparison.runs_of(model)
        )
        for model in comparison.ranked("model")
    }
    splits = "<br>".join(
        f"seed {split.seed}: {len(split.train):,} training, {len(split.test):,} held out, <code>{digest}</code>"
        for split, digest in zip(comparison.splits, comparison.split_hashes, strict=True)
    )
    return {
        **{escape(name): text for name, text in leakage.items()},
        "data, sha256": f"<code>{comparison.data_sha256}</code>",
        "splits, sha256": splits,
        **origin_of(origin),
    }


def origin_of(origin: dict[str, Any]) -> dict[str, str]:
    """Return the entries of a page that say by what code, where and when its numbers were made."""
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    return {
        "scfm": f"{origin['scfm']}, commit <code>{origin['commit'] or 'not known (installed package)'}</code>",
        "versions": f"Python {origin['python']}, {escape(versions)}",
        "machine": escape(origin["machine"]),
        "time": escape(origin["time"]),
    }
