"""Fixtures that many tests share, and the closing lines that say how many golden and real-data tests ran."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of goldens and real data; tests that need it skip where it is absent."""
    place = Path(os.environ.get("SCFM_SHARED", Path(__file__).parents[2] / "shared"))
    if not place.is_dir():
        pytest.skip("no shared data: set SCFM_SHARED to the folder that holds golden/ and data/")
    return place


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


MARKERS = ("golden", "realdata", "peer", "gpu")  # counted in the closing lines


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity", action="store_true", help="print the largest error of each stored scGPT case")


outcomes: Counter[tuple[str, str]] = Counter()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        for marker in MARKERS:
            if marker in report.keywords:
                outcomes[marker, "skipped" if report.outcome == "skipped" else "ran"] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.config.getoption("--parity"):
        from scgpt_cases import parity_table

        terminalreporter.write_line(parity_table())
    for marker in MARKERS:
        ran, skipped = outcomes[marker, "ran"], outcomes[marker, "skipped"]
        terminalreporter.write_line(f"{marker} tests: {ran} ran, {skipped} skipped")
