"""`make audit`: what it says of advisories, and of packages that nobody looked up."""

from __future__ import annotations

import importlib.util
import json
import urllib.error
import urllib.request
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/audit.py"


@pytest.fixture
def audit() -> Any:
    spec: Any = importlib.util.spec_from_file_location("audit", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package(name: str, *advisories: str) -> dict[str, Any]:
    vulns = [{"id": advisory, "fix_versions": ["2.0"] if advisory == "A-1" else []} for advisory in advisories]
    return {"name": name, "version": "1.0", "vulns": vulns}


def test_advisories_fail(audit: Any) -> None:
    lines, code = audit.report({"dependencies": [package("torch", "A-1", "A-2"), package("numpy")]})
    assert lines == [
        "torch 1.0: A-1, mended in 2.0",
        "torch 1.0: A-2, mended in no version",
        "audit: 2 of 2 pinned packages looked up, 2 advisories",
    ]
    assert code == 1


def test_nothing_found_passes(audit: Any) -> None:
    assert audit.report({"dependencies": [package("numpy")]}) == (
        ["audit: 1 of 1 pinned packages looked up, 0 advisories"],
        0,
    )


def test_what_was_skipped_is_no_clean_bill(audit: Any) -> None:
    """pip-audit itself says `No known vulnerabilities found` where it has looked up none."""
    skipped = [{"name": f"p{i}", "skip_reason": "Dependency not found on PyPI"} for i in range(6)]
    lines, code = audit.report({"dependencies": skipped})
    assert lines[0] == "audit: 0 of 6 pinned packages looked up, 0 advisories"
    assert "NOT looked up" in lines[1]
    assert lines[1].endswith("p0, p1, p2, p3, p4 ...")
    assert code == 0


@pytest.mark.parametrize("content", [None, b"{}", b"<html>"])
def test_a_registry_without_advisories_holds_nothing_back(
    audit: Any, content: bytes | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def urlopen(*_: Any, **__: Any) -> BytesIO:
        if content is None:
            raise urllib.error.URLError("no such host")
        return BytesIO(content)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(audit, "audited", lambda _: pytest.fail("pip-audit was run"))
    assert audit.main([]) == 0
    assert "no package was looked up" in capsys.readouterr().out


def test_where_advisories_are_reached_they_are_asked(audit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = json.dumps({"vulnerabilities": []}).encode()
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: BytesIO(answer))
    monkeypatch.setattr(audit, "audited", lambda _: json.dumps({"dependencies": [package("torch", "A-1")]}))
    assert audit.main([]) == 1


def test_an_audit_that_breaks_off_holds_nothing_back(
    audit: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "why_unreachable", lambda _: "")
    monkeypatch.setattr(audit, "audited", lambda _: "")
    assert audit.main([]) == 0
    assert "pip-audit failed" in capsys.readouterr().out
