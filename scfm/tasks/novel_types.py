"""Types that a model was never shown: a threshold for calling a cell `Unassigned`, and what counts as right then."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from scfm.data.store import CellStore, Codes
from scfm.model.novelty import UNASSIGNED, novelty

if TYPE_CHECKING:
    from scfm.pretrained import PretrainedModel


def set_threshold(
    folder: Path,
    store: CellStore,
    rows: NDArray[np.int64],
    conditions: Mapping[str, Codes],
    score: Literal["probability", "energy"],
    kept: float,
) -> None:
    """Write into a model directory which cells its annotation head calls `Unassigned`.

    Args:
        folder: the model directory.
        store: holds cells of known types that the head did not learn from.
        rows: these cells.
        conditions: name -> (n_cells,) index of each cell's condition.
        score: what tells a novel type, see `scfm.model.novelty`.
        kept: the share of these cells that keep a label; what the threshold costs on known types.
    """
    from scfm.checkpoints.native import save_model
    from scfm.pretrained import load
    from scfm.tasks.frozen import HEAD, per_cell

    model: PretrainedModel = load(folder)
    logits = per_cell(model, store, rows, conditions, lambda pack: model.network(pack).predictions[HEAD])
    threshold = float(np.quantile(novelty(logits, score), kept, method="higher"))
    model.files.heads = [
        replace(head, novelty=score, threshold=threshold) if head.task == HEAD else head for head in model.files.heads
    ]
    save_model(folder, model.network, model.files, replace=True)


def novel_as_unassigned(truth: NDArray[np.str_], known: Collection[str]) -> NDArray[np.str_]:
    """Return true labels (n,) in which every type that is not among the known ones is `Unassigned`.

    Scored against them, a cell of a novel type is right where it was called `Unassigned` and an error where it was
    given a type; a cell of a known type that was called `Unassigned` is an error too.
    """
    return np.where(np.isin(truth, sorted(known)), truth, UNASSIGNED)
