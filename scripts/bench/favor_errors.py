"""How far FAVOR+ is from exact softmax attention, by width of a head and number of features: a table in Markdown.

    python scripts/bench/favor_errors.py

One cell of 1,024 genes, 2 heads, queries and keys of independent normal numbers (0.577: as after initialisation; 1: as
attention that has something to say), values half of whose variance is the key's. The error is |out - exact| / |exact|,
the mean of 4 draws of the features; `uniform` is the same error of a plain mean over the values: a mixer above it would
do better to look at nothing.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import Tensor

from scfm.bench.report import significant
from scfm.evaluation.provenance import provenance
from scfm.model import features
from scfm.model.performer import Favor, Segments, Softmax
from scfm.recipe import PerformerConfig

GENES, HEADS, DRAWS = 1024, 2, 4
FEATURES = (64, 266, 1024, 4096)
WIDTHS = (16, 20, 32, 64)
SPREADS = (0.577, 1.0)
FORMS: dict[str, dict[str, Any]] = {
    "correct": {"mode": "correct"},
    "correct, norms": {"mode": "correct", "scaling": "norms"},
    "compat, norms": {"mode": "compat", "scaling": "norms"},
}
ALL_EPS = (1e-4, 1e-6, 1e-8, 1e-12)
CELL = Segments(torch.tensor([0, GENES], dtype=torch.int32), GENES)


def cell_of(width: int, spread: float) -> tuple[Tensor, Tensor, float]:
    """Return queries, keys and values (T, 3, H, d), exact attention over them, and the error of uniform attention."""
    draw = torch.Generator().manual_seed(0)
    q, k, noise = torch.randn(3, GENES, HEADS, width, generator=draw)
    qkv = torch.stack([spread * q, spread * k, k + noise], 1)
    exact = Softmax()(qkv, CELL)
    return qkv, exact, relative(qkv[:, 2].mean(0, keepdim=True).expand_as(exact), exact)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def error(qkv: Tensor, exact: Tensor, m: int, form: dict[str, Any]) -> float:
    """Return the mean error over draws of m features."""
    mixer = Favor(PerformerConfig(head_width=qkv.shape[-1], features=m, **form))
    errors = []
    for seed in range(DRAWS):
        mixer.redraw(torch.Generator().manual_seed(seed))
        errors.append(relative(mixer(qkv, CELL), exact))
    return significant(sum(errors) / DRAWS, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file for the JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, of_eps = [], []
    print(f"| q, k | head width | uniform | form | {' | '.join(f'm = {m}' for m in FEATURES)} |")
    print("|---" * (4 + len(FEATURES)) + "|")
    for spread in SPREADS:
        for width in WIDTHS:
            qkv, exact, uniform = cell_of(width, spread)
            for name, form in FORMS.items():
                errors = {m: error(qkv, exact, m, form) for m in FEATURES}
                rows.append({"spread": spread, "width": width, "uniform": uniform, "form": name, "errors": errors})
                print(f"| {spread} | {width} | {uniform:.3f} | {name} | {' | '.join(map(str, errors.values()))} |")
    print(f"\n| correct, m = 266, eps | {' | '.join(f'{eps:g}' for eps in ALL_EPS)} |")
    print("|---" * (1 + len(ALL_EPS)) + "|")
    usual = features.EPS
    for width, spread in ((20, 0.577), (20, 1.0), (64, 0.577), (64, 1.0), (64, 1.5)):
        qkv, exact, _ = cell_of(width, spread)
        found = {}
        for eps in ALL_EPS:
            features.EPS = eps
            found[eps] = error(qkv, exact, 266, FORMS["correct"])
        features.EPS = usual
        of_eps.append({"spread": spread, "width": width, "errors": found})
        print(f"| head width {width}, q, k {spread} | {' | '.join(map(str, found.values()))} |")
    if options.out:
        result = {
            "bench": "favor_errors",
            "errors": rows,
            "eps": of_eps,
            "genes": GENES,
            "heads": HEADS,
            **provenance(),
        }
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
