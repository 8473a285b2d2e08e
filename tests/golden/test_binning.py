"""Bins beside those of the original implementation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from scgpt_cases import OTHERWISE

from scfm.data.binning import bin_counts, bin_reals

pytestmark = pytest.mark.golden


def bins_of(row: np.ndarray, n_bins: int, spread_ties: bool = False, stream: int = 0) -> np.ndarray:
    """Bin the non-zero values of a dense row; zeros stay 0."""
    expressed = np.flatnonzero(row)
    bins, one = np.empty(len(expressed), np.uint16), np.zeros(1, np.int64)
    kernel = bin_reals if row.dtype.kind == "f" else bin_counts
    offsets, streams = np.array([0, len(expressed)], np.int32), np.array([stream], np.uint64)
    kernel(offsets, row[expressed], one, np.linspace(0, 1, n_bins - 1), spread_ties, streams, one, bins)
    dense = np.zeros(len(row), np.int64)
    dense[expressed] = bins
    return dense


def test_tie_free_rows(shared: Path) -> None:
    OTHERWISE["binning_tiefree"] = "exact"
    case = shared / "golden/scgpt/binning_tiefree"
    settings = json.loads((case / "config.json").read_text())["cases"]
    inputs, outputs = load_file(case / "inputs.safetensors"), load_file(case / "outputs.safetensors")
    assert len(inputs) == len(settings) == 23
    for name, row in inputs.items():
        assert bins_of(row, settings[name]["n_bins"]).tolist() == outputs[name].tolist(), name


@pytest.mark.parametrize("n_bins", [6, 11, 51])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_ties_left(shared: Path, n_bins: int, dtype: type) -> None:
    case = shared / "golden/scgpt/digitize_ties"
    counts = load_file(case / "inputs.safetensors")["counts"]
    expected = load_file(case / "outputs.safetensors")[f"one_bins{n_bins}"]
    bins = bins_of(counts.astype(dtype), n_bins)
    assert bins[counts > 0].tolist() == expected.tolist()


@pytest.mark.parametrize("n_bins", [6, 11, 51])
def test_random_ties_take_the_originals_range(shared: Path, n_bins: int) -> None:
    case = shared / "golden/scgpt/digitize_ties"
    counts = load_file(case / "inputs.safetensors")["counts"].astype(np.uint8)
    outputs = load_file(case / "outputs.safetensors")
    bins = np.stack([bins_of(counts, n_bins, spread_ties=True, stream=stream) for stream in range(4000)])
    bins = bins[:, counts > 0]
    assert bins.min(0).tolist() == outputs[f"both_min_bins{n_bins}"].tolist()
    assert bins.max(0).tolist() == outputs[f"both_max_bins{n_bins}"].tolist()


def test_preprocessed_cells(shared: Path) -> None:
    outputs = load_file(shared / "golden/scgpt/preprocessor/outputs.safetensors")
    bins = np.stack([bins_of(row, 51) for row in outputs["X_log1p"]])
    assert bins.tolist() == outputs["X_binned"].tolist()
