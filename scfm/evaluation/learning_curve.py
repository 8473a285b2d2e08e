"""The learning curve: every method on ever more labelled cells, judged by the same held-out ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scfm.errors import ScfmError
from scfm.evaluation.splits import Split
from scfm.tasks.annotation import few_per_type

if TYPE_CHECKING:
    from anndata import AnnData

    from scfm.evaluation.harness import Method

CELLS_PER_TYPE: tuple[int | None, ...] = (1, 5, 10, 50, None)  # None: all of them


def few_shot(split: Split, labels: NDArray, most: int | None) -> Split:
    """Return a split with at most so many training cells of each type; what is held out stays.

    Cells are drawn by the split's seed, so that those of a smaller number are among those of a larger one.
    """
    if most is None:
        return split
    train = few_per_type(split.train, labels, most, split.seed)
    return replace(split, train=train, protocol=f"{split.protocol}; at most {most} training cells of a type")


def learning_curve(
    methods: Sequence[Method],
    adata: AnnData,
    label: str,
    splits: Sequence[Split],
    *,
    cells_per_type: Sequence[int | None] = CELLS_PER_TYPE,
    cell_hashes: NDArray[np.uint64] | None = None,
) -> list[dict[str, Any]]:
    """Compare methods and the obligatory baselines at each number of training cells per type.

    Args:
        methods: what is judged; fitted afresh for every number and split.
        adata: labelled cells.
        label: obs column to predict.
        splits: one per seed; their held-out cells judge all numbers alike.
        cells_per_type: training cells of each type, at most; None for all.
        cell_hashes: (N,) profile hash of each cell, to count leakage.

    Returns:
        the rows of `Comparison.rows`, each with `cells_per_type` (None for all) and `training_cells`.

    Raises:
        ScfmError: no number is given, or one is below 1; or as `compare` does.
    """
    from scfm.evaluation.harness import compare

    if not cells_per_type or any(most is not None and most < 1 for most in cells_per_type):
        raise ScfmError(f"cells_per_type: {list(cells_per_type)}; give numbers of at least 1, or None for all cells")
    labels = adata.obs[label].to_numpy(dtype=str)
    rows = []
    for most in cells_per_type:
        few = [few_shot(split, labels, most) for split in splits]
        comparison = compare(methods, adata, label, few, cell_hashes=cell_hashes)
        n_cells = {split.seed: len(split.train) for split in few}
        rows += [row | {"cells_per_type": most, "training_cells": n_cells[row["seed"]]} for row in comparison.rows()]
    return rows
