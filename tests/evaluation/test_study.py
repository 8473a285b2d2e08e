"""A study: what is tried and what cannot be, no run made twice, chosen by validation, judged once beside baselines."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from cells import made_up_cells
from rich.console import Console
from runs import tiny_recipe, write_shards

from scfm.baselines import OBLIGATORY, KNNOnPCA, MajorityClass
from scfm.checkpoints.native import ModelFiles, read_model
from scfm.data.building.directory import locked
from scfm.errors import ScfmError
from scfm.evaluation import report, study_runs
from scfm.evaluation.study import study
from scfm.evaluation.study_design import INIT, TERMS, StudyRecipe, configurations_of, read_study
from scfm.evaluation.study_report import print_study
from scfm.evaluation.study_results import Study, range_probability
from scfm.evaluation.study_runs import Question, forget_failures, make, make_run, plan_of, share_of
from scfm.recipe_reader import bundled
from scfm.training import run
from scfm.training.run import pretrain

QUICK: dict[str, Any] = {
    "data": {"cells_per_batch": 16, "mask_ratios": [0.4], "valid_fraction": 0.2},
    "objectives": [{"name": "cls"}, {"name": "gep"}],
    "trainer": {"max_epochs": 1, "accelerator": "cpu"},
    "checkpoint": {"best": "valid/cls"},
}
SETTINGS = ("full", "probe", "zero_shot", "lora", "scratch")
GRID: dict[str, Any] = {
    "task": "annotation",
    "recipe": "finetune/annotation-quickstart.yaml",
    "base": QUICK,
    "design": "grid",
    "seeds": 2,
    "vary": {"optimizer.lr": [1e-3, 1e-2]},
    "init": ["pretrained", "all_frozen"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("study-model")
    return pretrain(tiny_recipe(write_shards(place / "shards"), place / "run"))


@pytest.fixture(scope="module")
def files(model: Path) -> ModelFiles:
    return read_model(model)


def recipe(**keys: Any) -> StudyRecipe:
    return StudyRecipe(**{"task": "annotation", "recipe": "finetune/annotation-quickstart.yaml", "base": QUICK, **keys})


def tried(files: ModelFiles, **keys: Any) -> dict[str, Any]:
    _, found = configurations_of(recipe(**keys), files, "cell_type", SETTINGS)
    return {one.name: one for one in found}


def test_one_key_changes_at_a_time_around_the_default(files: ModelFiles) -> None:
    vary = {"optimizer.lr": [1e-4, 1e-3, "1e-2"], "objectives.gep.weight": [0.1], "data.mask_ratios": [[0.15]]}
    found = tried(files, vary=vary, without=["gep"])
    assert list(found) == [
        "default",
        "optimizer.lr 0.0001",
        "optimizer.lr 0.01",
        "objectives.gep.weight 0.1",
        "data.mask_ratios 0.15",
        f"{TERMS} without gep",
    ]
    assert found["optimizer.lr 0.01"].recipe.optimizer.lr == 0.01
    assert found["default"].recipe.data.n_bins == files.tokens.n_bins
    assert [one.weight for one in found["objectives.gep.weight 0.1"].recipe.objectives] == [1.0, 0.1]
    assert [one.name for one in found[f"{TERMS} without gep"].recipe.objectives] == ["cls"]
    assert all(one.reason is None for one in found.values())


def test_initial_settings_are_those_of_the_recipe(files: ModelFiles) -> None:
    found = tried(files, init=["pretrained", "scratch", "encoder_frozen", "decoder_frozen", "all_frozen"])
    set_by = {name: (one.recipe.task.setting, one.recipe.trainable) for name, one in found.items()}
    assert set_by == {
        "default": ("full", ["*"]),
        f"{INIT} scratch": ("scratch", ["*"]),
        f"{INIT} encoder frozen": ("full", ["heads.*"]),
        f"{INIT} decoder frozen": ("full", ["backbone.*"]),
        f"{INIT} all frozen": ("zero_shot", ["*"]),
    }


def test_what_cannot_be_tried_says_why(files: ModelFiles) -> None:
    per_bin = replace(files, model=replace(files.model, value_encoder="category"))
    bins = {"vary": {"data.n_bins": [7]}, "init": ["pretrained", "scratch"], "design": "grid"}
    found = tried(per_bin, **bins)
    assert re.match("the pretrained value encoder holds an embedding for each", found["data.n_bins 7"].reason)
    assert found[f"data.n_bins 7, {INIT} scratch"].reason is None
    assert tried(files, **bins)["data.n_bins 7"].reason is None
    vary = {"objectives.gep.weight": [3.0], "data.mask_ratios": [[0.0]]}
    found = tried(files, vary=vary, init=["pretrained", "all_frozen"], without=["gep"], design="grid")
    reasons = {name: one.reason for name, one in found.items()}
    assert (
        reasons[f"objectives.gep.weight 3, {INIT} all frozen"] == "nothing trains, so objectives.gep.weight is not read"
    )
    assert reasons[f"objectives.gep.weight 3, {TERMS} without gep"] == (
        "gep is left out, so objectives.gep.weight is not read"
    )
    assert "gep predicts unknown genes" in reasons["data.mask_ratios 0.0"]
    assert reasons[f"data.mask_ratios 0.0, {TERMS} without gep"] is None
    _, found = configurations_of(recipe(init=["all_frozen", "scratch"]), files, "cell_type", ("zero_shot",))
    assert found[1].reason == "annotation has no task.setting scratch; it has zero_shot"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"vary": {"optimizer.rate": [1]}}, r"vary: optimizer\.rate: is no key of the recipe"),
        ({"vary": {"objectives.ecs.weight": [1]}}, r"vary: objectives\.ecs\.weight: there is no objectives\.ecs"),
        ({"vary": {"data.n_bins": ["many"]}}, "n_bins"),
        ({"without": ["ecs"]}, "without: ecs is no term of the loss, which has cls, gep"),
        ({"base": {**QUICK, "objectives": []}}, "the default, around which all varies, cannot be tried: objectives"),
    ],
)
def test_keys_that_no_recipe_has_are_refused(files: ModelFiles, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ScfmError, match=message):
        tried(files, **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"varry": {}}, "varry is no key of a study; there is task"),
        ({"recipe": None}, "recipe must be given"),
        ({"init": ["frozen"]}, r"init: \['frozen'\]; choose from pretrained"),
        ({"seeds": 0}, "seeds: 0 is none"),
        ({"design": "random"}, "choose one of one_at_a_time, grid"),
        ({"vary": {"optimizer.lr": 1e-3}}, "each key needs a list"),
        ({"without": "gep"}, "without: 'gep' is not a list"),
    ],
)
def test_a_study_recipe_is_checked(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(GRID | keys))
    with pytest.raises(ScfmError, match=message):
        read_study(tmp_path / "study.yaml")


def test_the_bundled_study_names_keys_that_are_there(files: ModelFiles) -> None:
    bundled_study = read_study(bundled("evaluate/study.yaml"))
    factors, found = configurations_of(bundled_study, files, "cell_type", SETTINGS)
    assert len(found) == 1 + sum(len(factor.levels) - 1 for factor in factors)
    assert {factor.name for factor in factors} == {*bundled_study.vary, INIT, TERMS}
    assert [one.name for one in found if one.reason] == []


def test_parts() -> None:
    assert share_of("3/8") == (3, 8)
    assert share_of(None) == (1, 1)
    for wrong in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(ScfmError, match=f"--part {wrong}: write I/N"):
            share_of(wrong)


def test_the_range_of_means_is_tested_as_tukey_does() -> None:
    from scipy.stats import ttest_rel

    draw = np.random.default_rng(0)
    scores = draw.normal(size=(2, 6)) + draw.normal(size=6)
    assert range_probability(scores) == pytest.approx(ttest_rel(*scores).pvalue, abs=1e-6)  # of two levels the same
    assert range_probability(scores + np.array([[0.0], [40.0]])) < 1e-4
    assert range_probability(scores[:, :1]) is None
    assert range_probability(np.array([[0.5, 0.6], [0.5, 0.6]])) == 1.0


@pytest.fixture(scope="module")
def asked(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("study")
    made_up_cells(90, seed=1).write_h5ad(place / "cells.h5ad")
    (place / "study.yaml").write_text(yaml.safe_dump(GRID))
    data = [str(place / "cells.h5ad")]
    return {"config": str(place / "study.yaml"), "model": str(model), "data": data, "out": str(place / "study")}


@pytest.fixture(scope="module")
def finished(asked: dict[str, Any]) -> tuple[Study, list[str]]:
    """A study that was stopped in its third run and taken up again, and the keys of the runs as they were made."""
    made: list[str] = []

    def stopping(plan: Any, planned: Any) -> None:
        if len(made) == 2:
            (plan.place(planned) / "work" / "annotation-seed0").mkdir(parents=True)  # half a run
            raise KeyboardInterrupt
        made.append(planned.key)
        make_run(plan, planned)

    def counting(plan: Any, planned: Any) -> None:
        made.append(planned.key)
        make_run(plan, planned)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OBLIGATORY, "annotation", [MajorityClass, KNNOnPCA])
        # drawing takes seconds, and is tested elsewhere
        patch.setattr(report, "figures", lambda *_: [])
        patch.setattr(run, "loss_curves", lambda *_: None)
        patch.setattr(study_runs, "make_run", stopping)
        with pytest.raises(KeyboardInterrupt):
            study(**asked)
        patch.setattr(study_runs, "make_run", counting)
        found = study(**asked)
    assert found is not None
    return found, made


def test_a_stopped_study_goes_on_and_makes_no_run_twice(finished: tuple[Study, list[str]]) -> None:
    found, made = finished
    # lr x init, of which all frozen reads no lr: 3 configurations and 2 baselines on 2 seeds
    assert len(made) == len(set(made)) == 2 * (3 + 2)
    assert sorted(made) == sorted(run.key for run in found.plan.runs)
    assert found.passed
    kept = {path.name for path in found.plan.folder.glob("runs/*/work/*/*")}
    assert "recipe.yaml" in kept
    assert not kept & {"model", "checkpoints"}


def test_validation_and_test_cells_are_apart(finished: tuple[Study, list[str]]) -> None:
    plan = finished[0].plan
    test = set(plan.cells.adata.obs_names[plan.outer.test])
    assert not test & set(plan.tuning.adata.obs_names)
    assert len(test) + len(plan.tuning.truth) == 90
    for split in plan.splits:
        assert sorted([*split.train, *split.test]) == list(range(len(plan.tuning.truth)))
    comparison = finished[0].test
    assert comparison is not None
    assert [set(comparison.cell_names[split.test]) for split in comparison.splits] == [test, test]
    assert [split.seed for split in comparison.splits] == [0, 1]


def test_what_is_best_on_validation_cells_is_judged_beside_baselines(finished: tuple[Study, list[str]]) -> None:
    found = finished[0]
    means = {name: found.summary(name, "macro_f1").mean for name in found.tried}
    assert means[found.chosen] == max(means.values())
    comparison = found.test
    assert comparison is not None
    assert comparison.names("model")[0] == f"chosen: {found.chosen}"
    assert comparison.names("baseline") == found.baselines == ["majority class", "kNN on PCA"]
    content = json.loads((found.plan.folder / "study.json").read_text())
    assert (content["configurations_tried"], content["chosen"]) == (3, found.chosen)
    assert len(content["runs"]) == 10
    assert (found.plan.folder / "test" / "report.html").exists()
    page = (found.plan.folder / "study.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "not applicable: nothing trains, so optimizer.lr is not read" in page
    assert "kNN on PCA" in page


def test_the_terminal_says_how_many_were_tried(finished: tuple[Study, list[str]]) -> None:
    shown = io.StringIO()
    print_study(finished[0], Console(file=shown, width=120))
    text = " ".join(shown.getvalue().split())
    assert "3 configurations tried; chosen by macro-F1 on validation cells: " in text
    assert "The chosen configuration is the best of 3" in text
    assert "majority class" in text
    with pytest.raises(ScfmError, match="no report: every baseline failed"):
        print_study(replace(finished[0], results=[one for one in finished[0].results if one["kind"] == "model"]))


def test_marginals_are_over_settings_that_have_all_levels(finished: tuple[Study, list[str]]) -> None:
    found = finished[0]
    rate, init = found.marginal(0, "macro_f1"), found.marginal(1, "macro_f1")
    assert (rate.levels, rate.settings) == ([0, 1], 1)  # of pretrained only: all frozen has no other rate
    assert (init.levels, init.settings) == ([0, 1], 1)
    names = [found.plan.factors[0].shown(k) for k in rate.levels]
    changed = f"optimizer.lr {names[1 - found.plan.factors[0].default]}"
    expected = [found.values(name, "macro_f1") for name in ("default", changed)]
    order = [0, 1] if found.plan.factors[0].default == 0 else [1, 0]
    np.testing.assert_array_equal(rate.scores, [expected[k] for k in order])
    ranked = found.ranked()
    assert {one.factor for _, one in ranked} == {"optimizer.lr", INIT}
    assert ranked[0][0] == 1
    assert ranked[0][1].range >= ranked[1][1].range
    levels = [found.summary(name, "macro_f1").mean for name in ("default", changed)]
    moved = next(one for _, one in ranked if one.factor == "optimizer.lr")
    assert moved.range == pytest.approx(abs(levels[0] - levels[1]))


def test_a_finished_study_scores_the_test_cells_no_more(
    finished: tuple[Study, list[str]], asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OBLIGATORY, "annotation", [MajorityClass, KNNOnPCA])
    again = study(**asked)
    assert again is not None
    assert again.test is None
    assert [one["name"] for one in again.tested] == [finished[0].chosen]
    assert again.chosen == finished[0].chosen
    with pytest.raises(ScfmError, match="is a study with another label, outer; choose another --out"):
        study(**asked, label="batch")
    with pytest.raises(ScfmError, match="holds something that is not a study"):
        study(**asked | {"out": str(Path(asked["out"]).parent)})


def test_failures_are_rows_and_a_run_under_way_is_left_to_its_process(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(MajorityClass):
        def fit(self, *_: Any) -> Any:
            raise ValueError("no majority")

    monkeypatch.setitem(OBLIGATORY, "annotation", [Broken, KNNOnPCA])
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(GRID | {"vary": {}, "init": ["all_frozen"], "seeds": 1}))
    asked = asked | {"config": str(tmp_path / "study.yaml"), "out": str(tmp_path / "out")}
    plan = plan_of(Question(**asked | {"data": tuple(asked["data"])}, label="cell_type"))
    with locked(plan.place(plan.runs[0]), "lock", "making a run in"):
        assert make(plan, None, 1) == 2
    assert plan.pending() == [plan.runs[0]]
    assert make(plan, "2/2", 1) == 0
    assert make(plan, "1/2", 1) == 1
    found = Study(plan, study_runs.read_results(plan, plan.runs))
    assert found.failure("majority class") == "failed: ValueError: no majority"
    assert not found.passed
    shown = io.StringIO()
    print_study(found, Console(file=shown, width=160))
    assert "majority class (failed: ValueError: no majority)" in shown.getvalue()
    forget_failures(plan)
    assert [run.name for run in plan.pending()] == ["majority class"]


def test_a_process_that_dies_is_told(asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = SimpleNamespace(start=lambda: None, join=lambda: None, exitcode=-9)
    context = SimpleNamespace(Process=lambda **_: gone)
    monkeypatch.setattr(study_runs.multiprocessing, "get_context", lambda _: context)
    plan = plan_of(Question(**asked | {"data": tuple(asked["data"]), "out": str(tmp_path)}, label="cell_type"))
    with pytest.raises(ScfmError, match=r"2 of 2 processes ended early .* the same command goes on with them"):
        make(plan, None, 2)
