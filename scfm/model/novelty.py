"""How little a cell looks like any of the types that a head knows."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax

UNASSIGNED = "Unassigned"


def novelty(logits: NDArray[np.floating], score: Literal["probability", "energy"]) -> NDArray[np.float64]:
    """Return the novelty of cells, (n, C) logits -> (n,): high where no type fits.

    `probability`: 1 - the largest probability. `energy`: -logsumexp of the logits (Liu et al., NeurIPS 2020), which
    also sees a cell that fits two types badly, or all of them.
    """
    logits = np.asarray(logits, dtype=np.float64)
    return 1 - softmax(logits, axis=1).max(axis=1) if score == "probability" else -logsumexp(logits, axis=1)
