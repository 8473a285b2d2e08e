"""Has the model seen the held-out cells before? By the hashes of their profiles, by data set, and by donor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scfm.data.hashing import overlap
from scfm.errors import ScfmError

if TYPE_CHECKING:
    from scfm.evaluation.protocol import LabelledCells

DATASET, DONOR = "dataset_id", "donor_id"  # obs columns of CELLxGENE files, and what manifests call the same


@dataclass(frozen=True)
class Leakage:
    """How many held-out cells have a profile that the model was trained on, and what else both have in common.

    Attributes:
        cells: held-out cells.
        seen: those whose exact profile is among the training cells.
        datasets: data sets of held-out cells that the model was trained on.
        donors: donors of held-out cells that the model was trained on.
    """

    cells: int
    seen: int
    datasets: tuple[str, ...] = ()
    donors: tuple[str, ...] = ()

    @property
    def any(self) -> bool:
        """Whether there is any overlap."""
        return bool(self.seen or self.datasets or self.donors)

    def __str__(self) -> str:
        if not self.any:
            return f"none of {self.cells:,} held-out cells was in the training data"
        said = []
        if self.seen:
            share = f"{self.seen / self.cells:.1%}"
            said.append(f"{self.seen:,} of {self.cells:,} held-out cells ({share}) were in the training data")
        for what, names in (("data sets", self.datasets), ("donors", self.donors)):
            if names:
                shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
                said.append(f"{len(names):,} of their {what} were in the training data ({shown})")
        return "; ".join(said)


@dataclass(frozen=True)
class TrainedOn:
    """What a model says it was trained on, beside the cells to be judged on as its vocabulary shows them.

    Attributes:
        hashes: (n,) sorted profile hashes of its training cells (`cells.hash`), or None where it does not say.
        cells: (N,) profile hash of each cell of the data; it depends on the genes that the model knows.
        datasets: data sets that it names.
        donors: donors that it names.
    """

    hashes: NDArray[np.uint64] | None
    cells: NDArray[np.uint64]
    datasets: frozenset[str] = frozenset()
    donors: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, training_data: dict[str, Any], hashes: NDArray[np.uint64] | None, cells: NDArray[np.uint64]
    ) -> TrainedOn:
        """Read it off a model directory: `training_data.json`, of all stages of training, and `cells.hash`."""
        named: dict[str, set[str]] = {DATASET: set(), DONOR: set()}
        for manifest in _manifests(training_data):
            held = manifest.get("held_out") or {"by": None, "groups": []}
            for source in manifest["sources"]:
                if held["by"] == "source" and source["file"] in held["groups"]:
                    continue
                origins, provenance = source.get("origins", {}), source.get("provenance", {})
                of_file = {provenance.get(DATASET), *provenance.get("datasets", {})} - {None}
                for column, names in named.items():
                    found = {*origins.get(column, ()), *(of_file if column == DATASET else ())}
                    # groups that were held out when the shards were built were never trained on
                    names |= found - set(held["groups"] if held["by"] == column else ())
        return cls(hashes, cells, frozenset(named[DATASET]), frozenset(named[DONOR]))


def _manifests(training_data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the manifests of what a model was trained on, the last stage first."""
    if "manifest" in training_data:
        yield training_data["manifest"]
    if training_data.get("pretraining"):
        yield from _manifests(training_data["pretraining"])


def leakage_of(trained_on: TrainedOn, cells: LabelledCells, test: NDArray[np.int64]) -> Leakage | None:
    """Count what held-out cells have in common with what a model was trained on; None where nothing is known of it."""
    if trained_on.hashes is None and not trained_on.datasets and not trained_on.donors:
        return None
    counted = count_leakage(
        trained_on.cells[test], np.empty(0, np.uint64) if trained_on.hashes is None else trained_on.hashes
    )
    obs = cells.adata.obs.iloc[test]
    of_data = set(obs[DATASET].astype(str)) if DATASET in obs else set()
    # donors of different data sets are often named alike (D1, P2): where both sides name theirs, the sets must meet
    comparable = not (of_data and trained_on.datasets) or bool(of_data & trained_on.datasets)
    donors = set() if cells.donors is None or not comparable else set(cells.donors[test]) & trained_on.donors
    return Leakage(
        counted.cells, counted.seen, tuple(sorted(of_data & trained_on.datasets)), tuple(sorted(map(str, donors)))
    )


def count_leakage(test_hashes: NDArray[np.uint64], training_hashes: NDArray[np.uint64]) -> Leakage:
    """Count held-out cells whose profile hash (n_test,) is among the sorted training hashes (n,), as `cells.hash` has.

    Raises ScfmError where the training hashes are not sorted.
    """
    if (training_hashes[1:] < training_hashes[:-1]).any():
        raise ScfmError("training hashes are not sorted, as those of cells.hash are; the file is damaged")
    return Leakage(len(test_hashes), int(overlap(training_hashes, test_hashes).sum()))


def refuse_leakage(method: str, leakage: Leakage | None) -> None:
    """Raise ScfmError where a method was trained on held-out cells, or does not say what it was trained on."""
    if leakage is None:
        raise ScfmError(f"--strict: {method} does not say which cells it was trained on, so leakage is not ruled out")
    if leakage.any:
        raise ScfmError(f"--strict: {method} was trained on what it is to be judged on: {leakage}")
