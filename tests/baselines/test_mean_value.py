"""Predicting a mean: the bar that a value loss must clear."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from runs import tiny_recipe, write_shards

from scfm.baselines.mean_value import baselines_of, mean_value_losses
from scfm.data.shards import open_shards
from scfm.data.tokens import Tokeniser
from scfm.training.datamodule import CellDataModule
from scfm.training.run import token_config


def test_both_means_against_a_plain_computation(tmp_path: Path) -> None:
    recipe = tiny_recipe(write_shards(tmp_path / "shards"), tmp_path / "run")
    store = open_shards(tmp_path / "shards")
    tokeniser = Tokeniser(token_config(recipe), store.vocabulary, store.value_kind)
    data = CellDataModule(store, tokeniser, recipe.data, range(100), range(100, 120), {}, seed=0)

    def hidden(rows: range, shuffle: bool) -> tuple[np.ndarray, np.ndarray]:
        loader = data.pack_loader(rows, shuffle=shuffle, rank=0, world_size=1)
        packs = [pack for packs in loader.batches(epoch=0) for pack in packs]
        genes = np.concatenate([pack.genes[pack.predicted].numpy() for pack in packs])
        return genes, np.concatenate([pack.targets[pack.predicted].numpy() for pack in packs])

    genes, targets = hidden(range(100), shuffle=True)
    test_genes, test_targets = hidden(range(100, 120), shuffle=False)
    of_gene = {gene: targets[genes == gene].mean() for gene in np.unique(genes)}
    by_gene = np.array([of_gene.get(gene, targets.mean()) for gene in test_genes])
    losses = mean_value_losses(data, n_genes=len(store.vocabulary))
    assert losses == pytest.approx(
        {
            "baseline/global mean": np.square(test_targets - targets.mean()).mean(),
            "baseline/gene mean": np.square(test_targets - by_gene).mean(),
        },
        rel=1e-5,
    )
    assert baselines_of([(0, name, value) for name, value in losses.items()] + [(1, "train/loss", 9.0)]).keys() == {
        "global mean",
        "gene mean",
    }
