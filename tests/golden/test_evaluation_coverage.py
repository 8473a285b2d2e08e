"""Every stored evaluation value is named by a test, or listed here with the reason why it is not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from scfm.evaluation import metrics

pytestmark = pytest.mark.golden

DE = "rank-sum test and adjustment of pdex, not written yet: the perturbation task brings them"
CELLWISE = "over the cells and not the means of a perturbation, not written yet: the perturbation task brings it"
PEER = "a bench of the peer's own classifiers, run with the real package where scripts/plugins are tested"
NOT_ASSERTED: dict[str, dict[str, str]] = {
    "annotation": {
        "weighted_f1": "weighs types by their cells, so rare ones vanish: not reported",
        "cohen_kappa": "not reported",
        "mcc": "not reported",
    },
    "integration": {
        "ilisi_graph": "graph LISI of scib's compiled program; we report kNN LISI, which is asserted",
        "clisi_graph": "as ilisi_graph",
        "max_abs_dev_numpy_vs_library": "how well the goldens' own restatement does",
    },
    "czbenchmarks": {
        "adjusted_rand_index": "one Leiden run by igraph at resolution 1, another optimiser than ours",
        "normalized_mutual_info": "as adjusted_rand_index",
        **{f"mean_fold_{score}": PEER for score in ("accuracy", "f1", "precision", "recall", "auroc")},
    },
    "perturb_celleval": {
        **{f"{score}_at_{n}": DE for score in ("overlap", "precision") for n in ("N", "50", "100", "200", "500")},
        **{f"de_{score}": DE for score in ("spearman_sig", "direction_match", "spearman_lfc_sig", "sig_genes_recall")},
        "de_nsig_counts_real": DE,
        "de_nsig_counts_pred": DE,
        "pr_auc": DE,
        "roc_auc": DE,
        "pearson_edistance": CELLWISE,
        "clustering_agreement": CELLWISE,
        "agg": "means of the rows above",
    },
    "perturb": {
        "no_change": "0/0: the README says not to test its change; that we give NaN is tested",
        "gears_split": "GEARS' split of conditions is not written yet: the perturbation task brings it",
    },
    "pertpy_distances": {
        "wasserstein": "entropic transport of OTT at its own regularisation: nothing scfm reports",
        "sym_kldiv": "explodes; the README says not to test it",
        "root_mean_squared_error": "the Euclidean norm under another name; the README says not to test it",
    },
}
# asserted by the tests of the baselines, which are what these values are of
ELSEWHERE = {"paramfree"}
ABOUT = {
    "versions",
    "version",
    "random_seed",
    "params",
    "input",
    "formula",
    "statistic",
    "pertpy",
    "data",
    "background",
}


def score_names(task: str, golden: Any, left: set[str]) -> set[str]:
    """Collect the keys that lead to a number, walking past keys that are left out on purpose."""
    found: set[str] = set()
    if isinstance(golden, dict):
        if "metric" in golden and "value" in golden:
            return {golden["metric"]} - left
        for key, value in golden.items():
            if key in left | ABOUT:
                continue
            if value is None or isinstance(value, int | float):
                found.add(key)
            found |= score_names(task, value, left)
    elif isinstance(golden, list):
        for value in golden:
            if isinstance(value, dict):
                found |= score_names(task, value, left)
    return found


def test_every_value_is_named_or_excused(shared: Path) -> None:
    here = Path(__file__)
    # later tasks compare whole dicts of scores with the goldens, so the names stand in the package
    sources = list(Path(metrics.__file__).parent.glob("*.py"))
    sources += [
        path for path in here.parent.glob("test_*.py") if "evaluation" in path.name or "annotation" in path.name
    ]
    text = "\n".join(path.read_text() for path in sources if path != here)
    text += "".join(f'"discrimination_score_{metric}"' for metric in ("l1", "l2", "cosine"))  # an f-string there
    quoted = set(re.findall(r'"([^"\n]+)"', text))
    goldens = sorted((shared / "golden/evaluation").glob("*_expected.json"))
    assert goldens
    unnamed: list[str] = []
    for path in goldens:
        task = path.name.removesuffix("_expected.json")
        if task in ELSEWHERE:
            continue
        golden = json.loads(path.read_text())
        left = set(NOT_ASSERTED.get(task, {}))
        everything = path.read_text()
        assert not [name for name in left if f'"{name}"' not in everything], "excused, but not among the goldens"
        # keys that are data (genes, conditions, resolutions, types) are looped over, never named
        data = re.compile(r"^(g\d+(\+\w+)?|P\d|b\d|\d\.\d|T|B|NK|Mono|Plasma)$")
        names = {name for name in score_names(task, golden, left) if not data.match(name)}
        unnamed += [f"{task}: {name}" for name in sorted(names - quoted)]
    assert not unnamed, "stored values that no test names: " + ", ".join(unnamed)


def test_excuses_are_not_stale() -> None:
    text = "\n".join(
        path.read_text() for path in Path(__file__).parent.glob("test_evaluation_*.py") if path != Path(__file__)
    )
    asserted = [name for left in NOT_ASSERTED.values() for name in left if f'wanted["{name}"]' in text]
    assert not asserted, f"asserted and excused at once: {asserted}"
