"""A report is one file that needs nothing else, says who won, and does not exist without its baselines."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from comparisons import compared
from rich.console import Console

from scfm.errors import ScfmError
from scfm.evaluation.harness import Comparison
from scfm.evaluation.report import print_report, write_report
from scfm.evaluation.splits import load_splits
from scfm.evaluation.training_plots import TrainingLog

LOG = TrainingLog([(1, "train/cls", 2.0), (2, "train/cls", 1.0), (2, "valid/cls", 1.5)])


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compared(name="a <b>model</b> [red]")


@pytest.fixture(scope="module")
def written(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "new" / "folder"
    assert write_report(comparison, out, title="Types & cells", training={"fine-tuning": LOG}) == out / "report.html"
    return out


def test_the_folder_holds_the_page_the_scores_and_the_splits(written: Path) -> None:
    assert sorted(path.name for path in written.iterdir()) == ["metrics.json", "report.html", "splits.json"]


def test_the_page_needs_no_other_file_and_no_network(written: Path) -> None:
    page = (written / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert len(sources) == 5  # scores, F1 by type, confusion, calibration, training; the oracle gives no embedding
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"<script|@import|url\(", page)


def test_names_are_escaped(written: Path) -> None:
    page = (written / "report.html").read_text()
    assert "<b>model</b>" not in page
    assert "a &lt;b&gt;model&lt;/b&gt; [red]" in page
    assert "<title>Types &amp; cells</title>" in page


def test_the_page_shows_every_method_the_verdict_and_the_hashes(written: Path, comparison: Comparison) -> None:
    page = (written / "report.html").read_text()
    for name in comparison.names("baseline"):
        assert f'<td class="baseline">{name}</td>' in page
    assert re.search(r"beats .{0,60} on macro-F1 by 0\.\d{3} \(95% interval", page)
    assert comparison.data_sha256 in page
    assert all(digest in page for digest in comparison.split_hashes)
    assert f"{comparison.summary('logistic regression', 'macro_f1').mean:.3f}" in page


def test_metrics_json_holds_a_row_per_method_seed_and_metric(written: Path, comparison: Comparison) -> None:
    found = json.loads((written / "metrics.json").read_text())
    assert len(found["rows"]) == len(comparison.kinds) * 3 * 6
    row = next(row for row in found["rows"] if row["method"] == "kNN on PCA" and row["metric"] == "accuracy")
    assert row["split_sha256"] == comparison.split_hashes[row["seed"]]
    assert row["value"] == comparison.runs_of("kNN on PCA")[0].values["accuracy"]
    assert row["data_sha256"] == comparison.data_sha256
    assert {"commit", "versions", "seconds_fit", "peak_mib", "parameters", "uninformative", "kind"} <= set(row)
    assert {"commit", "versions", "machine", "time", "data_sha256", "caveats", "differences", "protocols"} <= set(found)
    assert [entry["seen"] for entry in found["leakage"]] == [None] * 3


def test_the_frozen_splits_can_be_loaded(written: Path, comparison: Comparison) -> None:
    loaded = load_splits(written / "splits.json", comparison.cell_names.tolist())
    assert [split.hash(comparison.cell_names.tolist()) for split in loaded] == comparison.split_hashes


def test_there_is_no_report_without_its_baselines(comparison: Comparison, tmp_path: Path) -> None:
    for runs in (
        [run for run in comparison.runs if run.method != "logistic regression"],
        [run for run in comparison.runs if (run.method, run.split) != ("majority class", 2)],
    ):
        with pytest.raises(ScfmError, match="no report: the baseline"):
            write_report(replace(comparison, runs=runs), tmp_path / "out", title="")
        with pytest.raises(ScfmError, match="no report: the baseline"):
            print_report(replace(comparison, runs=runs))
    assert not (tmp_path / "out").exists()


def test_the_terminal_shows_scores_verdict_and_notes_on_80_columns(comparison: Comparison) -> None:
    shown = io.StringIO()
    print_report(comparison, Console(file=shown, width=80))
    text = shown.getvalue()
    assert str(comparison.summary("logistic regression", "macro_f1")) in text
    assert "[red]" in text
    assert re.search(r"beats .{0,60}on macro-F1 by 0\.", " ".join(text.split()))
    assert "leakage is not ruled out" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
