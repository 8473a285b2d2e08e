"""The stored evaluation values, in a form that notes which of them tests looked at; at the end none may be left.

`tests/conftest.py` gathers the notes of all processes and fails a run of all these tests that left a value out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

looked_at: set[str] = set()  # task/key/key, filled while the tests of this process run

PEER = "a bench of the peer's own classifiers: compared with the real package in tests/plugins/test_cz_benchmarks.py"
UNDEFINED = "0/0: the README says not to test it; that we give NaN is tested"
NOT_COMPARED = {
    "*/versions/*": "says what made the values",
    "*/version": "as versions",
    "*/pertpy": "as versions",
    "*/random_seed": "as versions",
    "*/input": "words about the data",
    "paramfree/formula": "words",
    "perturb_celleval/model": "words",
    "czbenchmarks/tasks/*/params/*": "words",
    "paramfree/max_abs_dev_restatement/*": "how well the goldens' own restatement does",
    "integration/*max_abs_dev_numpy_vs_library*": "as above",
    "integration/*/ilisi_graph": "graph LISI of scib's compiled program; we report kNN LISI, which is compared",
    "integration/*/clisi_graph": "as ilisi_graph",
    "czbenchmarks/*/label_prediction/*": PEER,
    "perturb_celleval/*/clustering_agreement": "clusters four mean profiles, finds nothing in common and gives the 0 "
    "its search starts from: any other clustering that agrees in nothing would equal it",
    "perturb/models/no_change/gears_*/pearson_delta*": UNDEFINED,
    "perturb/models/no_change/scgpt_*/pearson_*delta": UNDEFINED,
    "perturb/models/no_change/gears_*/frac_*_direction_*": "the sign of rounding noise; that we find no sign is tested",
    "pertpy_distances/distances_from_ctrl/wasserstein/*": "entropic transport at a regularisation of OTT's own: "
    "nothing scfm reports",
    "pertpy_distances/distances_from_ctrl/sym_kldiv/*": "explodes; the README says not to test it",
    "pertpy_distances/distances_from_ctrl/root_mean_squared_error/*": "the Euclidean norm under another name; the "
    "README says not to test it",
}
if find_spec("scib_metrics") is None:
    NOT_COMPARED["integration/*/kbet_per_label"] = "kBET needs scib-metrics, the extra `eval`, which is not installed"


class Stored(dict[str, Any]):
    """A dict of stored values that notes every value taken out of it; dicts within it do the same.

    Only a single value, or a list of single values, counts: taking out a dict looks at nothing yet.
    """

    def __init__(self, values: dict[str, Any], place: str) -> None:
        super().__init__({key: _noting(value, f"{place}/{key}") for key, value in values.items()})
        self.place = place

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if _is_value(value):
            looked_at.add(f"{self.place}/{key}")
        return value

    def items(self) -> Iterator[tuple[str, Any]]:  # type: ignore[override]
        return ((key, self[key]) for key in self)

    def values(self) -> Iterator[Any]:  # type: ignore[override]
        return (self[key] for key in self)


def _noting(value: Any, place: str) -> Any:
    if isinstance(value, dict):
        return Stored(value, place)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [Stored(one, f"{place}/{k}") for k, one in enumerate(value)]
    return value


def _is_value(value: Any) -> bool:
    return not isinstance(value, dict) and not (isinstance(value, list) and value and isinstance(value[0], dict))


def stored(shared: Path, task: str) -> Stored:
    """Read the stored values of a task: annotation, integration, perturb and so on."""
    return Stored(json.loads((shared / f"golden/evaluation/{task}_expected.json").read_text()), task)


def all_values(shared: Path) -> set[str]:
    """Return the places of all values of all tasks."""

    def places(values: dict[str, Any], place: str) -> Iterator[str]:
        for key in values:
            value = dict.__getitem__(values, key)
            if isinstance(value, dict):
                yield from places(value, f"{place}/{key}")
            elif _is_value(value):
                yield f"{place}/{key}"
            else:
                for one in value:
                    yield from places(one, one.place)

    files = sorted((shared / "golden/evaluation").glob("*_expected.json"))
    tasks = [path.name.removesuffix("_expected.json") for path in files]
    return {place for task in tasks for place in places(stored(shared, task), task)}


def faults(values: set[str], compared: set[str], excused: dict[str, str] = NOT_COMPARED) -> list[str]:
    """Say in words which values no test looked at, and which excuses excuse nothing."""
    left = values - compared
    unexcused = sorted(place for place in left if not any(fnmatchcase(place, pattern) for pattern in excused))
    stale = [pattern for pattern in excused if not any(fnmatchcase(place, pattern) for place in left)]
    return [f"no test looked at {place}" for place in unexcused] + [
        f"excused in tests/golden_values.py, but compared or not stored: {pattern}" for pattern in stale
    ]
