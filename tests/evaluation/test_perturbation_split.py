"""The split by perturbed genes: what trains, and what is called unseen."""

from __future__ import annotations

from itertools import combinations

import pytest

from scfm.errors import ScfmError
from scfm.evaluation.perturbation_split import genes_of, simulation_split

GENES = [f"G{k}" for k in range(16)]
CONDITIONS = ["ctrl", *(f"{gene}+ctrl" for gene in GENES), *("+".join(pair) for pair in combinations(GENES, 2))]


@pytest.mark.parametrize("seed", [1, 5])
def test_no_gene_of_an_unseen_condition_trains(seed: int) -> None:
    split = simulation_split(CONDITIONS, seed)
    assert set(split.side_of) == set(CONDITIONS)
    trained = {gene for name, side in split.side_of.items() if side == "train" for gene in genes_of(name)}
    # validation holds genes of its own out, which count as seen at the test
    known = trained | {gene for name, side in split.side_of.items() if side == "val" for gene in genes_of(name)}
    n_known = {"unseen_single": 0, "combo_seen0": 0, "combo_seen1": 1, "combo_seen2": 2}
    for group, names in split.test_groups.items():
        assert names, group
        assert {len(known.intersection(genes_of(name))) for name in names} == {n_known[group]}
        assert {split.side_of[name] for name in names} == {"test"}
    assert len(known) == 12
    assert len(trained) < len(known)
    assert split.side_of["ctrl"] == "train"


def test_the_order_of_conditions_does_not_matter() -> None:
    assert simulation_split(CONDITIONS[::-1]) == simulation_split(CONDITIONS)
    assert simulation_split(CONDITIONS, 2) != simulation_split(CONDITIONS, 1)


@pytest.mark.parametrize(
    ("conditions", "words"), [(["A+ctrl", "A+ctrl"], "repeat"), (["A+B+C"], "A\\+B\\+C"), (["ctrl+ctrl"], "one gene")]
)
def test_conditions_it_cannot_place_are_refused(conditions: list[str], words: str) -> None:
    with pytest.raises(ScfmError, match=words):
        simulation_split(conditions)
