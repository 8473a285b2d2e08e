"""Majority bins: each guess is what its name says, on the masks that the model is judged on."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from runs import write_shards
from scbert_runs import scbert_recipe

from scfm.baselines.majority_bin import PREFIX, majority_bin_accuracies
from scfm.data.shards import open_shards
from scfm.training.datamodule import CellDataModule
from scfm.training.run import modules_of, pretraining_job


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CellDataModule:
    shards: Path = write_shards(tmp_path_factory.mktemp("cells") / "shards")
    recipe = scbert_recipe(shards, shards, data={"valid_fraction": 0.3})
    return modules_of(pretraining_job(recipe, open_shards(shards)))[1]


def rows_of(data: CellDataModule, *, training: bool) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """Return (gene, bin) of each hidden gene with the shown (gene, bin) of its cell."""
    found = []
    rows = data.train_rows if training else data.valid_rows
    for packs in data.pack_loader(rows, shuffle=training, rank=0, world_size=1).batches(epoch=0):
        for pack in packs:
            hidden = set(pack.predicted.tolist())
            genes, bins = pack.genes.tolist(), pack.targets.long().tolist()
            edges = pack.cu_seqlens.tolist()
            for first, last in pairwise(edges):
                shown = [(genes[t], bins[t]) for t in range(first, last) if t not in hidden and bins[t] > 0]
                found += [(genes[t], bins[t], shown) for t in range(first, last) if t in hidden]
    return found


def told_of(data: CellDataModule) -> list[bool]:
    """Return which hidden genes of the validation cells show their value all the same, in the order of `rows_of`."""
    loader = data.pack_loader(data.valid_rows, shuffle=False, rank=0, world_size=1)
    return [float(pack.values[t]) != 13 for packs in loader.batches(0) for pack in packs for t in pack.predicted]


def most(bins: list[int]) -> int:
    counts = Counter(bins)
    return min(counts, key=lambda b: (-counts[b], b))


def test_each_guess_is_counted_alike_by_hand(data: CellDataModule) -> None:
    trained, judged = rows_of(data, training=True), rows_of(data, training=False)
    everywhere = most([b for _, b, _ in trained])
    of_gene = {gene: most([b for g, b, _ in trained if g == gene]) for gene in {g for g, _, _ in trained}}
    such: dict[tuple[int, int], list[int]] = {}
    for g, b, shown in trained:
        such.setdefault((g, most([s for _, s in shown])), []).append(b)

    def in_such(g: int, own: int) -> int:
        return most(such[g, own]) if (g, own) in such else of_gene.get(g, everywhere)

    right = {
        "most frequent bin": [b == everywhere for _, b, _ in judged],
        "most frequent bin of the cell": [b == most([s for _, s in shown]) for _, b, shown in judged],
        "most frequent bin of the gene": [b == of_gene.get(g, everywhere) for g, b, _ in judged],
        "most frequent bin of the gene in such cells": [
            b == in_such(g, most([s for _, s in shown])) for g, b, shown in judged
        ],
    }
    told = told_of(data)
    assert 0 < sum(told) < 0.3 * len(told)  # the tenth that keeps its value is told right
    right = {name: [hit or shows for hit, shows in zip(hits, told, strict=True)] for name, hits in right.items()}
    expected = {PREFIX + name: pytest.approx(sum(hits) / len(hits)) for name, hits in right.items()}
    assert majority_bin_accuracies(data, 13) == expected
    assert len({guess.expected for guess in expected.values()}) == 4, "the guesses can no longer be told apart"
