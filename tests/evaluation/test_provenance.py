"""Where a score comes from is said with whatever is installed."""

from __future__ import annotations

import pytest

from scfm.evaluation import provenance


def test_packages_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("numpy", "no-such-package-as-this"))
    assert provenance.provenance()["versions"].keys() == {"numpy"}
