"""No stored case of scBERT is left without a test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.golden


def test_every_case_is_named_by_a_test(shared: Path) -> None:
    cases = {path.name for path in (shared / "golden/scbert").iterdir() if path.is_dir()}
    assert len(cases) == 24
    files = [path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py") if path != Path(__file__)]
    tests = "".join(text for text in files if "golden/scbert" in text)
    named = {case for case in cases if re.search(rf'golden/scbert/{case}\b|"{case}"(?!:)', tests)}
    assert sorted(cases - named) == []
