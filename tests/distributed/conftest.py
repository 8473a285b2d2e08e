"""The cells that all distributed runs train on."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import write_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("cells") / "shards")
