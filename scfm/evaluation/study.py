"""`scfm study`: which of a fine-tuning recipe's keys matter, chosen by validation, judged once on test cells."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

from scfm.data.building.directory import read_json, write_json
from scfm.errors import ScfmError
from scfm.evaluation.asked import AllCells
from scfm.evaluation.harness import Comparison, compare
from scfm.evaluation.leakage import TrainedOn
from scfm.evaluation.protocol import LabelledCells, Method, ModelInput
from scfm.evaluation.report import print_report, write_report
from scfm.evaluation.splits import Split
from scfm.evaluation.study_report import JSON, print_study, write_study
from scfm.evaluation.study_results import Study
from scfm.evaluation.study_runs import Plan, Question, forget_failures, key_of, make, plan_of, read_results, share_of


def study(
    *,
    config: str = "evaluate/study.yaml",
    model: str,
    data: Sequence[str],
    out: str,
    label: str = "cell_type",
    batch: str | None = None,
    donor: str | None = None,
    reference: str | None = None,
    split: str = "random",
    held_out: Sequence[str] = (),
    workers: int = 1,
    part: str | None = None,
    retry: bool = False,
) -> Study | None:
    """Try the configurations of a study's recipe, choose one by validation cells, and judge it once on test cells.

    Every configuration and every obligatory baseline is trained on the same cells with the same seeds. The same command
    goes on where a stopped one ended: a finished run is never made again. A run that fails, or a configuration that
    cannot be tried, is a row with the reason. Prints tables and writes study.json, study.html and, for what was
    chosen, test/report.html.

    Args:
        config: Recipe of the study: a file, or the name of a bundled one.
        model: Model directory that is fine-tuned.
        data: h5ad files with raw counts and labels; several are put together on the genes they share.
        out: Folder of the study.
        label: obs column that holds the labels.
        batch: obs column of the batches (integration needs one).
        donor: obs column of the donors, over which test intervals are given too; donor_id where it names several.
        reference: h5ad file to train and choose on; the data are then the test cells.
        split: How test cells are held out (random, donor, batch, study, species, or an obs column), and of the others
            validation cells, for every seed anew.
        held_out: The groups that are test cells, by name.
        workers: Processes on this machine that share the runs.
        part: I/N makes the I-th of N parts of the runs and no report, for machines that share a disk; give the command
            without it when all parts are made.
        retry: Make runs again that failed.
    """
    if workers < 1:
        raise ScfmError(f"--workers {workers}: at least 1")
    share_of(part)
    files = (data,) if isinstance(data, str) else tuple(data)
    question = Question(config, model, files, out, label, batch, donor, reference, split, tuple(held_out))
    plan = plan_of(question)
    same_study(plan)
    if retry:
        forget_failures(plan)
    left, n = len(plan.pending()), len(plan.runs)
    tried = sum(one.reason is None for one in plan.configurations)
    aside = len(plan.configurations) - tried
    print(
        f"{tried:,} configurations to try{f' ({aside} not applicable)' if aside else ''}, {len(plan.splits)} seeds, "
        f"and {len(plan.protocol.baselines())} baselines: {n:,} runs, {n - left:,} of them finished before"
    )
    made = make(plan, part, workers)
    left = len(plan.pending())
    if part is not None:
        print(f"part {part}: {made:,} runs made, {left:,} of {n:,} left in all; when none is, give no --part")
        return None
    if left:
        print(f"{left:,} runs are under way in other processes; give the same command again when they have ended")
        return None
    found = Study(plan, read_results(plan, plan.runs), tested=tested_before(plan))
    found = judged(found)
    title = f"{plan.study.task.capitalize()} study of {' and '.join(Path(file).stem for file in files)}"
    page = write_study(found, title)
    print_study(found)
    if found.test is not None:
        print_report(found.test)
    print(f"open {page}")
    return found


def same_study(plan: Plan) -> None:
    """Refuse a folder that holds something else, or a study of other cells. Raises ScfmError."""
    folder, said = plan.folder, plan.folder / "question.json"
    asks = asdict(plan.question) | {"outer": plan.outer.hash(plan.cells.adata.obs_names.tolist())}
    asks = {key: list(value) if isinstance(value, tuple) else value for key, value in asks.items() if key != "out"}
    del asks["config"]  # a recipe may grow: runs that it had before are not made again
    # listed first: another part of the study may just have begun
    there = folder.exists() and any(not one.name.startswith(said.name) for one in folder.iterdir())
    if said.exists():
        before = read_json(said)
        if changed := [key for key in asks if asks[key] != before.get(key)]:
            raise ScfmError(f"{folder}: is a study with another {', '.join(changed)}; choose another --out")
        return
    if there:
        raise ScfmError(f"{folder}: holds something that is not a study and is left as it is; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(said, asks)


def tested_before(plan: Plan) -> list[dict[str, str]]:
    """Return what was scored on the test cells when this study was written before."""
    path = plan.folder / JSON
    return list(read_json(path)["tested"]) if path.exists() else []


def judged(found: Study) -> Study:
    """Score what was chosen, and the default beside it, on the test cells, unless that was done before."""
    names = list(dict.fromkeys([found.chosen, found.default]))
    key = key_of({"runs": [one["key"] for one in found.results if one["method"] in names]})
    if found.tested and found.tested[-1]["key"] == key:
        return found
    comparison = on_test_cells(found.plan, names)
    write_report(comparison, found.plan.folder / "test", title=f"{found.plan.study.task.capitalize()}, test cells")
    tested = [*found.tested, {"name": found.chosen, "key": key}]
    return Study(found.plan, found.results, comparison, tested)


def on_test_cells(plan: Plan, names: Sequence[str]) -> Comparison:
    """Compare configurations, trained on all tuning cells, on the test cells, beside baselines and controls."""
    from scfm.data.hashing import store_hashes
    from scfm.pretrained import load

    cells, outer, path = plan.cells, plan.outer, Path(plan.question.model)
    splits = [Split(outer.train, outer.test, split.seed, outer.protocol) for split in plan.splits]
    if plan.protocol.transductive:
        cells = LabelledCells(cells.adata[outer.test].copy(), cells.label, cells.batch, cells.donor)
        splits = [AllCells.of(len(outer.test), split.seed) for split in plan.splits]
    runs = plan.folder / "test" / "runs"
    shutil.rmtree(runs, ignore_errors=True)  # of a process that was killed
    runs.mkdir(parents=True)
    start = load(path)
    hashes = store_hashes(start.store(cells.adata))
    known = TrainedOn.of(start.files.training_data, start.files.cell_hashes, hashes)
    methods: list[Method] = []
    trained_on = {}
    for name in names:
        configuration = next(one for one in plan.configurations if one.name == name)
        called = name if name != names[0] else f"chosen: {name}"
        methods.append(plan.model(configuration, called, runs / ("chosen" if name == names[0] else "default")))
        task = configuration.recipe.task
        if task is not None and task.setting != "scratch":  # starts from random weights, whatever the model has seen
            trained_on[called] = known
    untrained = plan.protocol.untrained(ModelInput(path, "random weights", runs))
    terminal = sys.stdout
    with (plan.folder / "test" / "log.txt").open("w", encoding="utf-8") as log, redirect_stdout(log):
        return compare(
            methods,
            cells.adata,
            cells.label,
            splits,
            task=plan.protocol,
            batch=cells.batch,
            donor=cells.donor,
            controls=[(untrained, "negative control")],
            cell_hashes=known.cells,
            trained_on=trained_on,
            say=lambda what: print(f"test cells, {what}", file=terminal, flush=True),
        )
