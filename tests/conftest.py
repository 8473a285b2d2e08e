"""Fixtures that many tests share, and the closing lines that say how many golden and real-data tests ran."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections import Counter
from pathlib import Path

import numba.core.caching
import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key
from golden_values import all_values, faults, looked_at

from scfm.compiled import FilePerSignature

# The processes of the suite compile scanpy's and umap's loops at the same time too, in a fresh environment
numba.core.caching.IndexDataCacheFile = FilePerSignature

SHARED = Path(os.environ.get("SCFM_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of goldens and real data; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("no shared data: set SCFM_SHARED to the folder that holds golden/ and data/")
    return SHARED


@pytest.fixture(autouse=True)
def threads_as_asked() -> None:
    """numba raises torch's number of threads, and processes that are forked then would wait for threads they lack."""
    torch, asked = sys.modules.get("torch"), os.environ.get("OMP_NUM_THREADS", "")
    if torch and asked.isdigit() and torch.get_num_threads() != int(asked):
        torch.set_num_threads(int(asked))


@pytest.fixture(autouse=True)
def crashes_are_told(request: pytest.FixtureRequest) -> None:
    """After a fit Lightning gives signals their handlers back, but not those of faulthandler: a crash was silent."""
    faulthandler.disable()
    faulthandler.enable(request.config.stash[fault_handler_stderr_fd_key])


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


MARKERS = ("golden", "realdata", "peer", "gpu")  # counted in the closing lines


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity", action="store_true", help="print the largest error of each stored scGPT case")


outcomes: Counter[tuple[str, str]] = Counter()
compared: set[str] = set()
reported: set[str] = set()
unlooked: list[str] = []


def pytest_runtest_teardown(item: pytest.Item) -> None:
    if looked_at:
        # the report is the only thing that a process of xdist hands to the one that counts
        item.user_properties.append(("looked_at", sorted(looked_at)))
        looked_at.clear()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        for marker in MARKERS:
            if marker in report.keywords:
                outcomes[marker, "skipped" if report.outcome == "skipped" else "ran"] += 1
    if report.when == "teardown":
        reported.add(Path(report.location[0]).name)
        for name, places in report.user_properties:
            if name == "looked_at":
                compared.update(places)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a run in which all tests of stored evaluation values passed, but a stored value was compared by none."""
    if hasattr(session.config, "workerinput") or exitstatus != 0 or not SHARED.is_dir():
        return
    readers = {
        path.name
        for path in Path(__file__).parent.rglob("test_*.py")
        if "from golden_values import stored" in path.read_text()
    }
    some_left_out = session.config.option.keyword or any("::" in arg for arg in session.config.args)
    if readers <= reported and not some_left_out:
        unlooked.extend(faults(all_values(SHARED), compared))
        if unlooked:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.config.getoption("--parity"):
        from scgpt_cases import parity_table

        terminalreporter.write_line(parity_table())
    for line in unlooked:
        terminalreporter.write_line(f"FAILED stored evaluation values: {line}")
    for marker in MARKERS:
        ran, skipped = outcomes[marker, "ran"], outcomes[marker, "skipped"]
        terminalreporter.write_line(f"{marker} tests: {ran} ran, {skipped} skipped")
