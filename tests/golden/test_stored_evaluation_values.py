"""The notes of which stored evaluation values are compared: what is not looked at is found, and so are idle excuses."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from golden_values import NOT_COMPARED, Stored, all_values, faults, looked_at


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    monkeypatch.setattr("golden_values.looked_at", found := set())
    return found


def test_only_what_is_taken_out_is_noted(notes: set[str]) -> None:
    values = Stored({"a": {"x": 1.0, "y": 2.0}, "rows": [{"z": 3.0}, {"z": 4.0}], "list": [5, 6], "no": None}, "task")
    assert notes == set()
    inner, row = values["a"], values["rows"][1]
    assert notes == set(), "a dict is no value"
    assert set(inner) == {"x", "y"}
    assert notes == set(), "nor is a name"
    assert inner["x"] == 1.0
    assert row["z"] == 4.0
    assert values["list"] == [5, 6]
    assert notes == {"task/a/x", "task/rows/1/z", "task/list"}
    mine = {"x": 1.0, "y": 2.0}
    assert mine == pytest.approx(inner)
    assert "task/a/y" in notes, "a comparison of whole dicts looks at all of it"


def test_values_left_out_and_idle_excuses_are_named() -> None:
    assert faults({"t/a", "t/b"}, {"t/a"}, {"t/b": "reason"}) == []
    assert faults({"t/a", "t/b"}, {"t/a"}, {}) == ["no test looked at t/b"]
    assert "excused" in faults({"t/a", "t/b"}, {"t/a", "t/b"}, {"t/b": "reason"})[0]


@pytest.mark.golden
def test_excuses_are_of_stored_values(shared: Path) -> None:
    values = all_values(shared)
    assert len(values) > 1000
    assert not [one for one in NOT_COMPARED if not any(fnmatchcase(place, one) for place in values)]
    assert looked_at.isdisjoint(values), "counting them is not looking at them"
