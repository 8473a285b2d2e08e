"""`scfm evaluate`: a model on a task, on labelled cells, beside the baselines it must beat."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scfm.errors import ScfmError

if TYPE_CHECKING:
    from anndata import AnnData

    from scfm.evaluation.splits import Split


def evaluate(
    task: str,
    *,
    model: str,
    data: str,
    out: str,
    label: str = "cell_type",
    reference: str | None = None,
    config: str | None = None,
    seeds: int = 3,
) -> None:
    """Fine-tune a model on labelled cells, predict held-out ones, and write report.html beside the baselines' scores.

    Without a reference, a fifth of each type of `data` is held out, drawn anew for every seed. With one, the model is
    fine-tuned on the reference and judged on all labelled cells of `data` whose type the reference has.

    Args:
        task: registered task: annotation.
        model: Model directory.
        data: h5ad file with raw counts and labels.
        out: Folder for report.html, metrics.json, splits.json and the runs; must not exist or be empty.
        label: obs column that holds the labels.
        reference: h5ad file to fine-tune on, from another donor, batch or study.
        config: fine-tuning recipe; the bundled one of the task if not given.
        seeds: How often everything is repeated; one seed says nothing of the spread.
    """
    from scfm.data.hashing import store_hashes
    from scfm.evaluation.harness import compare
    from scfm.evaluation.methods import FineTuned
    from scfm.evaluation.report import print_report, write_report
    from scfm.inference import read_anndata
    from scfm.pretrained import load
    from scfm.recipe_reader import read_yaml
    from scfm.tasks import TASKS

    if task not in TASKS:
        raise ScfmError(f"{task!r} is not a task that can be evaluated; choose one of {', '.join(sorted(TASKS))}")
    if seeds < 1:
        raise ScfmError(f"--seeds {seeds}: at least 1")
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise ScfmError(f"{folder}: is not empty; choose another --out")
    start = load(model)
    query = labelled(read_anndata(Path(data)), label, data)
    if reference is None:
        adata, splits = query, within(query, label, seeds)
    else:
        adata, splits = across(labelled(read_anndata(Path(reference)), label, reference), query, label, seeds)
    hashes = store_hashes(start.store(adata))
    sections = read_yaml(Path(config)) if config else {}
    method = FineTuned(f"{start.files.model.name} (scfm)", Path(model), folder / "runs", sections)
    comparison = compare([method], adata, label, splits, task=task, cell_hashes=hashes)
    where = Path(data).stem if reference is None else f"{Path(reference).stem} to {Path(data).stem}"
    page = write_report(comparison, folder, title=f"{task.capitalize()} of {where}")
    print_report(comparison)
    print(f"open {page}")


def labelled(adata: AnnData, label: str, file: str) -> AnnData:
    """Return the cells that have a label. Raises ScfmError where the column is absent or empty."""
    from scfm.recipe import TaskConfig

    if label not in adata.obs:
        raise ScfmError(f"{file}: has no obs column {label!r}; it has {', '.join(map(str, adata.obs.columns))}")
    names = adata.obs[label].astype(str).str.strip().str.lower()
    known = ~names.isin(TaskConfig().unlabelled) & adata.obs[label].notna()
    if not known.any():
        raise ScfmError(f"{file}: no cell has a label in {label!r}")
    return adata[known.to_numpy()].copy()


def within(adata: AnnData, label: str, seeds: int) -> list[Split]:
    """Return a stratified split for every seed."""
    from scfm.evaluation.splits import stratified_split

    labels = adata.obs[label].to_numpy(dtype=str)
    return [stratified_split(labels, seed=seed) for seed in range(seeds)]


def across(reference: AnnData, query: AnnData, label: str, seeds: int) -> tuple[AnnData, list[Split]]:
    """Return both sets together on the genes they share, and the split between them, once for every seed."""
    import anndata

    from scfm.evaluation.splits import Split

    known = query.obs[label].astype(str).isin(set(reference.obs[label].astype(str)))
    if not known.any():
        raise ScfmError(f"{label!r}: the reference and the data share no label, so nothing can be predicted")
    both = [counts_of(reference), counts_of(query[known.to_numpy()].copy())]
    if not len(both[0].var_names.intersection(both[1].var_names)):
        raise ScfmError("the reference and the data share no gene name; name genes alike in both (.var_names)")
    adata = anndata.concat(both, join="inner", index_unique="-", keys=["reference", "query"])
    rows = np.arange(adata.n_obs)
    train, test = rows[: reference.n_obs], rows[reference.n_obs :]
    protocol = (
        f"fitted on the reference, judged on the other set; {int((~known).sum())} cells of types it lacks left out"
    )
    return adata, [Split(train, test, seed, protocol) for seed in range(seeds)]


def counts_of(adata: AnnData) -> AnnData:
    """Return the cells with raw.X in place of X where there is one."""
    if adata.raw is not None:
        counts = adata.raw.to_adata()
        counts.obs = adata.obs
        return counts
    adata.var_names_make_unique()
    return adata
