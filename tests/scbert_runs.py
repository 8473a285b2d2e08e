"""Sections of a recipe for tiny runs of scBERT on made-up cells."""

from __future__ import annotations

from typing import Any

SCBERT: dict[str, Any] = {
    "data": {
        "genes": "all",
        "max_genes": 60,
        "tokens_per_pack": 600,
        "values": "log2",
        "n_bins": 10,  # some hundred counts a cell: one of them is 6 or 7
        "mask_ratios": [0.15],
        "mask_candidates": "expressed",
        "mask_kept": 0.1,
        "cls_value": 0,
        "mask_value": 10,
    },
    "model": {
        "name": "scbert",
        "width": 16,
        "heads": 2,
        "layers": 2,
        "hidden": 32,
        "dropout": 0.0,
        "attention": "full",
        "cell_embedding": "mean",
        "performer": {"head_width": 8},
    },
    "objectives": [{"name": "masked_bin"}],
}
