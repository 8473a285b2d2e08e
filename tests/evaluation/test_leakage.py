"""Held-out cells that were trained on are counted."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest

from scfm.errors import ScfmError
from scfm.evaluation.leakage import TrainedOn, count_leakage, leakage_of
from scfm.evaluation.protocol import LabelledCells


def hashes(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def test_seen_cells_are_counted_each_time_they_occur() -> None:
    found = count_leakage(hashes(5, 2**64 - 1, 7, 5), hashes(1, 5, 9, 2**64 - 1))
    assert (found.cells, found.seen) == (4, 3)
    assert str(found) == "3 of 4 held-out cells (75.0%) were in the training data"


def test_nothing_seen_reads_as_such() -> None:
    assert count_leakage(hashes(5, 7), hashes()).seen == 0
    assert str(count_leakage(hashes(5, 7), hashes(6))) == "none of 2 held-out cells was in the training data"


def test_unsorted_training_hashes_are_refused() -> None:
    with pytest.raises(ScfmError, match="not sorted"):
        count_leakage(hashes(5), hashes(9, 1))


def source(file: str, dataset: str, donors: list[str]) -> dict:
    origins = {"donor_id": donors, "dataset_id": [dataset] if dataset else []}
    return {"file": file, "origins": origins, "provenance": {}}


def test_data_sets_and_donors_are_read_off_all_stages_of_training() -> None:
    census = {"file": "census", "provenance": {"datasets": {"set3": {}}}}
    pretraining = {
        "stage": "pretraining",
        "manifest": {
            "sources": [source("a.h5ad", "set1", ["d1", "d2"]), source("b.h5ad", "set2", ["d3"]), census],
            "held_out": {"by": "donor_id", "groups": ["d2"], "cells": 5},
        },
    }
    tuning = {
        "stage": "fine-tuning",
        "manifest": {"sources": [source("c.h5ad", "", ["d9"])]},
        "pretraining": pretraining,
    }
    known = TrainedOn.of(tuning, None, hashes(1))
    assert known.datasets == {"set1", "set2", "set3"}
    assert known.donors == {"d1", "d3", "d9"}  # d2 was held out when the shards were built


def test_a_source_that_was_held_out_was_not_trained_on() -> None:
    held_out = {"by": "source", "groups": ["a.h5ad"], "cells": 5}
    manifest = {"sources": [source("a.h5ad", "set1", ["d1"]), source("b.h5ad", "set2", ["d3"])], "held_out": held_out}
    known = TrainedOn.of({"manifest": manifest}, hashes(), hashes(1))
    assert (known.datasets, known.donors) == ({"set2"}, {"d3"})
    assert TrainedOn.of({}, None, hashes(1)).datasets == frozenset()


def leakage_with(known: TrainedOn, dataset: str | None = None) -> str:
    obs = pd.DataFrame({"cell_type": list("abab"), "donor_id": ["d1", "d1", "d2", "d3"]}, index=list("wxyz"))
    if dataset:
        obs["dataset_id"] = dataset
    cells = LabelledCells(anndata.AnnData(np.ones((4, 2), np.float32), obs=obs), "cell_type", donor="donor_id")
    return str(leakage_of(known, cells, np.array([1, 2])))


def test_held_out_cells_are_looked_for_by_profile_data_set_and_donor() -> None:
    own = hashes(10, 11, 12, 13)
    assert leakage_with(TrainedOn(hashes(10, 13), own)) == "none of 2 held-out cells was in the training data"
    assert leakage_with(TrainedOn(hashes(11), own)) == "1 of 2 held-out cells (50.0%) were in the training data"
    by_donor = TrainedOn(None, own, donors=frozenset({"d2", "d3"}))
    assert leakage_with(by_donor) == "1 of their donors were in the training data (d2)"
    by_set = TrainedOn(hashes(), own, datasets=frozenset({"set1"}))
    assert leakage_with(by_set, "set1") == "1 of their data sets were in the training data (set1)"
    assert leakage_with(TrainedOn(None, own)) == "None"


def test_donors_named_alike_in_other_data_sets_are_no_evidence() -> None:
    own = hashes(10, 11, 12, 13)
    known = TrainedOn(hashes(), own, datasets=frozenset({"set1"}), donors=frozenset({"d1"}))
    assert "none of 2" in leakage_with(known, "set2")
    assert "1 of their donors" in leakage_with(known, "set1")
    assert "1 of their donors" in leakage_with(known)
