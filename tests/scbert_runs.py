"""Tiny runs of scBERT for tests: the recipe of `runs` with scBERT's model, values and objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runs import TINY

from scfm.recipe import Recipe
from scfm.recipe_reader import merged, read_recipe

# cells of 60 genes have hundreds of counts per 10,000 in each: with 6 bins all would be in the last
SCBERT: dict[str, Any] = {
    "data": {
        "cells_per_batch": 16,
        "tokens_per_pack": 400,
        "max_genes": 100,
        "valid_fraction": 0.1,
        "n_bins": 13,
        "mask_value": 13.0,
    },
    "model": {
        "name": "scbert",
        "width": 16,
        "heads": 2,
        "layers": 2,
        "hidden": 16,
        "performer": {"head_width": 8, "features": 16, "redraw_every": 3},
    },
    "objectives": [{"name": "masked_bin"}],
    "optimizer": TINY["optimizer"],
    "trainer": TINY["trainer"],
    "checkpoint": TINY["checkpoint"],
}


def scbert_recipe(shards: Path, out: Path, **sections: Any) -> Recipe:
    """Return a recipe for a tiny run of scBERT; sections are merged over the tiny defaults."""
    here = {"out": str(out), "data": {"shards": str(shards)}}
    return read_recipe(None, merged(merged(SCBERT, here), sections))
