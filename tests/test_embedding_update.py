"""The benchmark's three updates of the gene embedding: one first step, and where they part ways after it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts" / "bench"))
    module = importlib.import_module("embedding_update")
    monkeypatch.setattr(module, "ROWS", 50)
    return module


def test_first_steps_are_the_same(bench: ModuleType) -> None:
    assert bench.first_steps_differ_by() < 1e-6


def test_only_the_dense_one_moves_a_row_that_no_gene_touches(bench: ModuleType) -> None:
    """Its momentum goes on; this is why the others are other algorithms."""
    for name, make in bench.WAYS.items():
        torch.manual_seed(0)
        way = make(4)
        for genes in ([1, 2, 2], [2, 3]):
            before = way.table.detach().clone()
            way.look_up([torch.tensor(genes)])
            way.update([torch.randn(len(genes), 4)])
        moved = (way.table.detach() != before).any(1).nonzero()[:, 0].tolist()
        assert moved == ([1, 2, 3] if name == "dense" else [2, 3])


def test_several_packs_make_one_gradient(bench: ModuleType) -> None:
    genes, pull = torch.randint(0, 50, (20,)), torch.randn(20, 4)
    for make in bench.WAYS.values():
        tables = []
        for cuts in ([20], [12, 8]):
            torch.manual_seed(0)
            way = make(4)
            way.look_up(list(genes.split(cuts)))
            way.update(list(pull.split(cuts)))
            tables.append(way.table.detach())
        torch.testing.assert_close(tables[0], tables[1])
