"""Which perturbations train and which are held out, by the genes they hit: GEARS' "simulation" split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import RandomState

from scfm.errors import ScfmError

CONTROL = "ctrl"


@dataclass(frozen=True)
class PerturbationSplit:
    """One division of the perturbations of a screen.

    Attributes:
        side_of: condition -> train, val or test; the control trains.
        test_groups: unseen_single (its gene never trains), combo_seen0, combo_seen1, combo_seen2 (a pair of which so
            many genes train) -> the held-out conditions, in alphabetical order. The fewer seen, the harder.
    """

    side_of: dict[str, str]
    test_groups: dict[str, list[str]]


def genes_of(condition: str) -> list[str]:
    """Return the genes that a condition such as `KLF1+ctrl` or `KLF1+CEBPA` hits; none for `ctrl`."""
    return [gene for gene in condition.split("+") if gene != CONTROL]


def simulation_split(
    conditions: Sequence[str], seed: int = 1, train_genes: float = 0.75, train_pairs: float = 0.75
) -> PerturbationSplit:
    """Hold out genes, not cells: the split that published perturbation scores use (GEARS, seed 1).

    `train_genes` of the genes may train, with `train_pairs` of the pairs of two such genes; everything else is
    tested. Validation conditions are drawn from the training ones in the same way, with 90 % of each.

    Raises ScfmError for repeated conditions or one that hits more than two genes.
    Source: GEARS `DataSplitter.get_simulation_split`; drawn with NumPy's legacy generator, so that names equal its.
    """
    perturbed = [condition for condition in conditions if condition != CONTROL]
    if len(set(perturbed)) < len(perturbed):
        raise ScfmError("conditions repeat; give each perturbation once")
    if crowded := [condition for condition in perturbed if not 1 <= len(genes_of(condition)) <= 2]:
        raise ScfmError(f"{crowded[0]}: this split knows conditions of one gene (GENE+ctrl) or two (GENE+GENE)")
    training, test_groups = _hold_out_genes(perturbed, seed, train_genes, train_pairs)
    _, validation_groups = _hold_out_genes(training, seed, 0.9, 0.9)
    side_of = dict.fromkeys(conditions, "train") | {CONTROL: "train"}
    for side, groups in (("val", validation_groups), ("test", test_groups)):
        side_of |= dict.fromkeys([name for group in groups.values() for name in group], side)
    return PerturbationSplit(side_of, test_groups)


def _hold_out_genes(
    conditions: list[str], seed: int, train_genes: float, train_pairs: float
) -> tuple[list[str], dict[str, list[str]]]:
    genes = sorted({gene for condition in conditions for gene in genes_of(condition)})
    seen = set(RandomState(seed).choice(genes, int(len(genes) * train_genes), replace=False).tolist())
    groups: dict[str, list[str]] = {name: [] for name in ("combo_seen0", "combo_seen1", "combo_seen2", "unseen_single")}
    training, both_seen = [], []
    for condition in sorted(conditions):
        hit = genes_of(condition)
        n_seen = len(seen.intersection(hit))
        if n_seen == 2:
            both_seen.append(condition)
        elif len(hit) == 2:
            groups[f"combo_seen{n_seen}"].append(condition)
        elif n_seen:
            training.append(condition)
        else:
            groups["unseen_single"].append(condition)
    # GEARS seeds anew before it draws the pairs
    drawn = set(
        RandomState(seed).choice(np.array(both_seen), int(len(both_seen) * train_pairs), replace=False).tolist()
    )
    groups["combo_seen2"] = [condition for condition in both_seen if condition not in drawn]
    return training + sorted(drawn), groups
