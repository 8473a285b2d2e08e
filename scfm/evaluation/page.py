"""The report as one self-contained HTML page: no script, no network, figures inlined."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from scfm.evaluation.harness import Comparison, Summary
from scfm.evaluation.metrics import METRICS
from scfm.evaluation.verdict import Difference, signed

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
    """Return the page: verdict, tables, caveats, figures, methods, provenance, in this order."""
    n_seeds = len(comparison.splits)
    split = comparison.splits[0]
    byline = (
        f"{len(comparison.truth):,} cells, {len(comparison.labels)} types of <code>{escape(comparison.label)}</code>. "
        f"{escape(split.protocol[:1].upper() + split.protocol[1:])} ({len(split.test):,} cells), "
        f"{n_seeds} seed{'s' if n_seeds > 1 else ''}; every method on the same splits."
    )
    verdict = "".join(f"<p>{escape(str(one))}</p>" for one in differences) or "<p>Baselines only.</p>"
    notes = f"<h2>Read with care</h2><ul>{items(caveats)}</ul>" if caveats else ""
    pictures = "".join(figure_html(number, figure) for number, figure in enumerate(figures, start=1))
    body = (
        f'<h1>{escape(title)}</h1><p class="byline">{byline}</p>\n<div class="verdict">{verdict}</div>\n'
        f"{_score_table(comparison)}\n{_difference_table(differences)}\n{notes}\n{pictures}\n"
        f"<h2>Methods</h2>{definitions({name: escape(text) for name, text in comparison.descriptions.items()})}\n"
        f"<h2>Scores</h2>{definitions({one.title: escape(one.protocol) for one in METRICS.values()})}\n"
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


def _score(summary: Summary, best: bool) -> str:
    mean = f'<span class="best">{summary.mean:.3f}</span>' if best else f"{summary.mean:.3f}"
    return mean if summary.sd is None else f"{mean} <small>± {summary.sd:.3f}</small>"


def _score_table(comparison: Comparison) -> str:
    winners = {
        metric: max(
            comparison.kinds,
            key=lambda name: (1 if METRICS[metric].higher_is_better else -1) * comparison.summary(name, metric).mean,
        )
        for metric in METRICS
    }
    head = "".join(f"<th>{METRICS[metric].title[:1].upper() + METRICS[metric].title[1:]}</th>" for metric in METRICS)
    groups = []
    for kind in ("model", "baseline"):
        lines = []
        for name in comparison.names(kind):
            scores = "".join(
                f"<td>{_score(comparison.summary(name, metric), winners[metric] == name)}</td>" for metric in METRICS
            )
            seconds = f"{comparison.mean_seconds(name):,.1f}"
            lines.append(f'<tr><td class="{kind}">{escape(name)}</td>{scores}<td>{seconds}</td></tr>')
        if lines:
            groups.append(f'<tbody class="group">{"".join(lines)}</tbody>')
    n = len(comparison.splits)
    spread = f"Mean ± standard deviation over {n} seeds" if n > 1 else "One seed, so there is no spread"
    caption = (
        f"<b>Table 1. Scores on held-out cells.</b> {spread}; best of a column in bold; seconds to fit and predict."
    )
    return (
        f'<div class="scroll"><table><caption>{caption}</caption><thead><tr><th>Method</th>{head}<th>Seconds</th></tr>'
        f"</thead>{''.join(groups)}</table></div>"
    )


def _difference_table(differences: Sequence[Difference]) -> str:
    if not differences:
        return ""
    words = {"model": "model ahead", "baseline": "baseline ahead", "undecided": "not told apart"}
    lines = "".join(
        f'<tr><td class="model">{escape(one.model)}</td><td class="text">{escape(METRICS[one.metric].title)}</td>'
        f'<td class="text">{escape(one.baseline)}</td><td>{signed(one.interval.difference)}</td>'
        f"<td>{signed(one.interval.low)} to {signed(one.interval.high)}</td>"
        f'<td>{one.seeds_ahead} of {one.seeds}</td><td class="text">{words[one.outcome]}</td></tr>'
        for one in differences
    )
    caption = (
        "<b>Table 2. Difference to the best baseline.</b> Model minus baseline; 95% paired bootstrap interval over "
        f"{differences[0].interval.units:,} distinct held-out cells, resampled within types; fitted models held fixed."
    )
    return (
        f'<div class="scroll"><table><caption>{caption}</caption><thead><tr><th>Model</th><th class="text">Score</th>'
        '<th class="text">Best baseline</th><th>Difference</th><th>95% interval</th><th>Seeds ahead</th>'
        f'<th class="text">Outcome</th></tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _provenance(comparison: Comparison, origin: dict[str, Any]) -> dict[str, str]:
    leakage = {
        f"leakage, {model}": "<br>".join(
            f"seed {run.seed}: {run.leakage or 'not known; the method does not say what it was trained on'}"
            for run in comparison.runs_of(model)
        )
        for model in comparison.names("model")
    }
    splits = "<br>".join(
        f"seed {split.seed}: {len(split.train):,} training, {len(split.test):,} held out, <code>{digest}</code>"
        for split, digest in zip(comparison.splits, comparison.split_hashes, strict=True)
    )
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    return {
        **{escape(name): text for name, text in leakage.items()},
        "data, sha256": f"<code>{comparison.data_sha256}</code>",
        "splits, sha256": splits,
        "scfm": f"{origin['scfm']}, commit <code>{origin['commit'] or 'not known (installed package)'}</code>",
        "versions": f"Python {origin['python']}, {escape(versions)}",
        "machine": escape(origin["machine"]),
        "time": escape(origin["time"]),
    }
