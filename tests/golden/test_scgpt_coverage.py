"""No stored case of the original is left without a test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.golden


def test_every_case_is_named_by_a_test(shared: Path) -> None:
    cases = {path.name for path in (shared / "golden/scgpt").iterdir() if path.is_dir()}
    assert len(cases) == 32
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__))
    assert sorted(case for case in cases if not re.search(rf"\b{case}\b", tests)) == []
