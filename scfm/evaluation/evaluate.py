"""`scfm evaluate`: models on a task, on labelled cells, beside the baselines they must beat and the controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scfm.errors import ScfmError
from scfm.evaluation import asked, species
from scfm.evaluation.harness import Comparison, compare
from scfm.evaluation.leakage import TrainedOn
from scfm.evaluation.learning_curve import learning_curve
from scfm.evaluation.protocol import Kind, LabelledCells, Method, ModelInput
from scfm.evaluation.protocols import protocol_of
from scfm.evaluation.report import print_report, write_report

ARCHITECTURES = {"scgpt": "scGPT", "scbert": "scBERT"}  # as people write what recipes call model.name


def evaluate(
    task: str,
    *,
    model: str,
    data: Sequence[str],
    out: str,
    label: str = "cell_type",
    batch: str | None = None,
    donor: str | None = None,
    reference: str | None = None,
    split: str = "random",
    held_out: Sequence[str] = (),
    splits: str | None = None,
    orthologs: str | None = None,
    novel: Sequence[str] = (),
    setting: str | None = None,
    config: str | None = None,
    seeds: int = 3,
    curve: Sequence[int] = (),
    strict: bool = False,
) -> Comparison:
    """Judge models beside the task's baselines and controls, all on the same splits with the same seeds.

    Prints one table and writes report.html, metrics.json and splits.json. A method that fails is a row with the
    reason; the exit code is then 1.

    Args:
        task: annotation, integration or mapping.
        model: Model directories, or names on the Hub (org/name), separated by commas.
        data: h5ad files with raw counts and labels; several are put together on the genes they share.
        out: Folder for the report and the runs; must not exist or be empty.
        label: obs column that holds the labels.
        batch: obs column of the batches (integration needs one; annotation for --split batch).
        donor: obs column of the donors, over which intervals are given too; donor_id where it names several.
        reference: h5ad file to learn from, of another donor, batch or study; the data are then what is judged on.
        split: random, donor, batch, study, species, or an obs column: whole groups of it are held out.
        held_out: The groups to hold out, by name; a fifth of them, drawn for each seed, if not given.
        splits: Frozen splits, a report's splits.json, in place of new ones.
        orthologs: Table of orthologs, where the cells are of two organisms: all are given genes of the model's.
        novel: Types withheld from training, by name: held-out cells of them are right where called `Unassigned`.
        setting: How models are used, separated by commas; of a task's settings the first if not given.
        config: fine-tuning recipe, a file or one that comes with scfm; that of the task if not given.
        seeds: How often everything is repeated; one seed says nothing of the spread.
        curve: For annotation, a learning curve too: with so many training cells of each type, 1 5 10 50.
        strict: Refuse models that were trained on held-out cells, or do not say what they were trained on.
    """
    from scfm.checkpoints.hub import model_folder
    from scfm.checkpoints.native import read_model
    from scfm.data.hashing import store_hashes
    from scfm.data.orthologs import Orthologs
    from scfm.pretrained import load
    from scfm.recipe_reader import read_yaml, recipe_file

    protocol = protocol_of(task, bool(novel))
    if seeds < 1:
        raise ScfmError(f"--seeds {seeds}: at least 1")
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise ScfmError(f"{folder}: is not empty; choose another --out")
    if sum((reference is not None, splits is not None, split != "random")) > 1:
        raise ScfmError("--reference, --splits and --split each say what is held out; give one of them")
    if reference is not None and protocol.transductive:
        raise ScfmError(f"--reference: {task} is transductive; give all files as --data")
    if curve and novel:
        raise ScfmError("--curve: with --novel a few cells of a type leave none to set a threshold by; leave one out")
    paths = [model_folder(one) for one in model.split(",")]
    files = [data] if isinstance(data, str) else list(data)
    parts = asked.read_files(files, label)
    learned = asked.read_files([reference], label) if reference is not None else {}
    said = ""
    if orthologs is not None:
        sets, said = species.in_one_organism(
            [*learned.values(), *parts.values()], Orthologs.read(orthologs), read_model(paths[0]).vocabulary
        )
        learned, parts = dict(zip(learned, sets, strict=False)), dict(zip(parts, sets[len(learned) :], strict=True))
    if novel:
        asked.withhold([*learned.values(), *parts.values()], label, novel)
    adata = asked.as_one(parts)
    if learned:
        adata, divided = asked.across(asked.as_one(learned), adata, label, seeds)
    cells = LabelledCells(adata, label, batch, asked.donor_column(adata, donor))
    if splits is not None:
        divided = asked.frozen_splits(splits, adata)
    elif reference is None:
        divided = asked.splits_of(protocol, cells, split, held_out, seeds)
    if novel:
        divided = asked.without_novel(divided, cells.truth, novel)
    if said:
        divided = [replace(one, protocol=f"{one.protocol}; {said}") for one in divided]

    if curve and protocol.transductive:
        raise ScfmError(f"--curve: {task} learns from no labels, so it has no learning curve")
    sections = read_yaml(recipe_file(config)) if config else {}
    settings = setting.split(",") if setting else list(protocol.settings[:1])
    methods: list[Method] = []
    controls: list[tuple[Method, Kind]] = []
    trained_on: dict[str, TrainedOn] = {}
    hashes = None
    for path in paths:
        start = load(path)
        name = f"{ARCHITECTURES[start.files.model.name]} (scfm)" if len(paths) == 1 else run_name(path)
        known = TrainedOn.of(start.files.training_data, start.files.cell_hashes, store_hashes(start.store(adata)))
        hashes = known.cells if hashes is None else hashes
        for way in settings:
            called = name if len(settings) == 1 else f"{name}, {way.replace('_', ' ')}"
            given = ModelInput(path, called, folder / "runs" / f"{run_name(path)}-{way}", way, sections)
            methods.append(protocol.model(given))
            if way != "scratch":  # starts from random weights, whatever the model has seen
                trained_on[called] = known
        untrained = "random weights" if len(paths) == 1 else f"{name}, random weights"
        controls.append((protocol.untrained(ModelInput(path, untrained, folder / "runs")), "negative control"))
    comparison = compare(
        methods,
        adata,
        label,
        divided,
        task=protocol,
        batch=batch,
        donor=cells.donor,
        controls=controls,
        cell_hashes=hashes,
        trained_on=trained_on,
        strict=strict,
    )
    if curve:
        rows = learning_curve(methods, adata, label, divided, cells_per_type=list(curve), cell_hashes=hashes)
        comparison = replace(comparison, curve=rows)
    where = " and ".join(Path(file).stem for file in files)
    where = where if reference is None else f"{Path(reference).stem} to {where}"
    page = write_report(comparison, folder, title=f"{task.capitalize()} of {where}")
    print_report(comparison)
    print(f"open {page}")
    return comparison


def run_name(path: Path) -> str:
    """Return what tells a model directory from others: its name, or its run's where it is called `model`."""
    return path.resolve().parent.name if path.resolve().name == "model" else path.resolve().name
