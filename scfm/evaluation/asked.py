"""From files and options to the cells that a task is asked on, and the splits of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm.baselines.inputs import read_labels
from scfm.data.genes import ID_COLUMNS, KIND_COLUMNS, SYMBOL_COLUMNS, keys_across, with_names_of
from scfm.data.vocabulary import is_ensembl
from scfm.errors import ScfmError
from scfm.evaluation.protocol import EvaluationProtocol, LabelledCells
from scfm.evaluation.splits import Split, grouped_split, load_splits, stratified_split
from scfm.model.novelty import UNASSIGNED
from scfm.tasks.novel_types import novel_as_unassigned

if TYPE_CHECKING:
    from anndata import AnnData

# what a split is called -> obs columns that hold it; the first that is there counts
GROUPS = {
    "donor": ("donor_id", "donor"),
    "batch": ("batch",),
    "study": ("study", "dataset_id"),
    "species": ("organism", "species"),
}
FILE, DONOR = "file", "donor_id"
HELD_OUT = 0.2


def read_cells(files: Sequence[str], label: str) -> AnnData:
    """Return the labelled cells of files as one, as `as_one` does. Raises ScfmError as it and `read_files` do."""
    return as_one(read_files(files, label))


def read_files(files: Sequence[str], label: str) -> dict[str, AnnData]:
    """Return the labelled cells of files by the name of the file, without its ending.

    Raises ScfmError where a file has no such labels, or two are called alike.
    """
    from scfm.inference import read_anndata

    names = [Path(file).stem for file in files]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ScfmError(f"--data: several files are called {', '.join(repeated)}; rename one")
    return {name: labelled(read_anndata(Path(file)), label, file) for name, file in zip(names, files, strict=True)}


def as_one(parts: Mapping[str, AnnData]) -> AnnData:
    """Return sets of cells as one: of several on the genes that all share, obs["file"] naming the set of each cell.

    Raises ScfmError where they share no gene.
    """
    if len(parts) == 1:
        return next(iter(parts.values()))
    for name, part in parts.items():
        part.obs[FILE] = name
    return together(parts)


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


def together(parts: Mapping[str, AnnData]) -> AnnData:
    """Return several sets of cells as one, on the genes that all share, under the names that the first gives them.

    Genes are the same by Ensembl id where two sets have one, else by symbol; var holds the ids as `ensembl_id`.
    Raises ScfmError where they share no gene.
    """
    import anndata

    counts = {name: counts_of(part) for name, part in parts.items()}
    keys = keys_across([part.var for part in counts.values()])
    everywhere = set.intersection(*(set(one) for one in keys)) - {None}
    if not everywhere:
        raise ScfmError(f"{', '.join(parts)} share no gene, by Ensembl id or by symbol; name genes alike in all (.var)")
    genes = [key for key in keys[0] if key in everywhere]
    chosen = {}
    for (name, part), of_part in zip(counts.items(), keys, strict=True):
        place = {key: column for column, key in enumerate(of_part)}
        chosen[name] = part[:, [place[key] for key in genes]].copy()
        chosen[name].var = pd.DataFrame(index=pd.Index(genes, dtype=str))
    first = next(iter(counts.values())).var
    var = first.iloc[[column for column, key in enumerate(keys[0]) if key in everywhere]]
    both = anndata.concat(chosen, join="inner", index_unique="-")
    both.var = var[[name for name in (*ID_COLUMNS, *SYMBOL_COLUMNS, *KIND_COLUMNS) if name in var]].copy()
    both.var["ensembl_id"] = [key if key and is_ensembl(key) else None for key in genes]
    both.var_names_make_unique()
    return both


def counts_of(adata: AnnData) -> AnnData:
    """Return the cells with raw.X in place of X where there is one."""
    if adata.raw is not None:
        counts = adata.raw.to_adata()
        counts.obs = adata.obs
        counts.var = with_names_of(counts.var, adata.var)
        return counts
    adata.var_names_make_unique()
    return adata


def donor_column(adata: AnnData, asked: str | None) -> str | None:
    """Return the obs column of donors: the one asked for, else donor_id where it names two donors or more.

    Raises ScfmError where the one asked for is not there.
    """
    if asked is not None:
        if asked not in adata.obs:
            raise ScfmError(f"--donor: there is no obs column {asked!r}; there is {', '.join(map(str, adata.obs))}")
        return asked
    there = DONOR in adata.obs and adata.obs[DONOR].notna().all() and adata.obs[DONOR].nunique() > 1
    return DONOR if there else None


def splits_of(
    protocol: EvaluationProtocol, cells: LabelledCells, split: str, held_out: Sequence[str], seeds: int
) -> list[Split]:
    """Return a split for every seed: random cells, or whole groups of a column.

    Args:
        protocol: of the task; a transductive one is asked on all cells.
        cells: the cells.
        split: `random`, a name of GROUPS, or an obs column.
        held_out: the groups to hold out; without them a fifth of the groups is drawn for each seed.
        seeds: how many.

    Raises ScfmError where there is no such column, or it names one group only.
    """
    if protocol.transductive:
        if split != "random" or held_out:
            raise ScfmError(
                f"--split: {protocol.name} is transductive, methods see all cells; there is nothing to hold out"
            )
        return [AllCells.of(len(cells.truth), seed) for seed in range(seeds)]
    if split == "random":
        if held_out:
            raise ScfmError("--held-out: names groups; say of which column with --split")
        return [stratified_split(cells.truth, HELD_OUT, seed) for seed in range(seeds)]
    column = column_of(cells.adata, split, cells)
    groups = cells.adata.obs[column].astype(str).to_numpy(dtype=str)
    wanted = list(held_out) or None
    return [grouped_split(groups, wanted, test_fraction=HELD_OUT, seed=seed, unit=column) for seed in range(seeds)]


def column_of(adata: AnnData, split: str, cells: LabelledCells) -> str:
    """Return the obs column that holds the groups of a split. Raises ScfmError where there is none."""
    given = {"donor": cells.donor, "batch": cells.batch}.get(split)
    wanted = [given] if given else [*GROUPS.get(split, ()), split]
    for name in wanted:
        if name in adata.obs:
            return name
    raise ScfmError(
        f"--split {split}: there is no obs column {' or '.join(dict.fromkeys(wanted))}; "
        f"there is {', '.join(map(str, adata.obs.columns))}"
    )


class AllCells(Split):
    """Of a transductive task: methods see all cells, and are judged on all."""

    def __post_init__(self) -> None:
        """Both sides are the same cells, which is just what other splits refuse."""

    @classmethod
    def of(cls, n: int, seed: int) -> AllCells:
        """Return it for n cells."""
        rows = np.arange(n, dtype=np.int64)
        return cls(rows[:0], rows, seed, "all cells, seen by every method without their labels")


def across(reference: AnnData, query: AnnData, label: str, seeds: int) -> tuple[AnnData, list[Split]]:
    """Return both sets together on the genes they share, and the split between them, once for every seed.

    Raises ScfmError where they share no label or no gene.
    """
    learned = set(reference.obs[label].astype(str)) - {UNASSIGNED}
    known = query.obs[label].astype(str).isin(learned | {UNASSIGNED})
    if not (query.obs[label].astype(str).isin(learned)).any():
        raise ScfmError(f"{label!r}: the reference and the data share no label, so nothing can be predicted")
    adata = together({"reference": reference, "query": query[known.to_numpy()].copy()})
    rows = np.arange(adata.n_obs)
    train, test = rows[: reference.n_obs], rows[reference.n_obs :]
    protocol = (
        f"fitted on the reference, judged on the other set; {int((~known).sum())} cells of types it lacks left out"
    )
    return adata, [Split(train, test, seed, protocol) for seed in range(seeds)]


def withhold(parts: Sequence[AnnData], label: str, novel: Collection[str]) -> None:
    """Label the cells of novel types `Unassigned`, in place: what they should be called by who never saw such a type.

    Raises ScfmError for a type that no cell has, or where cells are called `Unassigned` already.
    """
    truths = [read_labels(part, label) for part in parts]
    there = sorted(set().union(*truths))
    if missing := sorted(set(novel) - set(there)):
        raise ScfmError(f"--novel: no cell is labelled {', '.join(missing)}; there is {', '.join(there)}")
    if UNASSIGNED in there:
        raise ScfmError(f"--novel: cells are labelled {UNASSIGNED} already, which is what novel ones should be called")
    for part, truth in zip(parts, truths, strict=True):
        part.obs[label] = pd.Categorical(novel_as_unassigned(truth, set(there) - set(novel)))


def without_novel(splits: Sequence[Split], truth: NDArray[np.str_], novel: Collection[str]) -> list[Split]:
    """Return splits whose training cells are of known types alone. Raises ScfmError where no novel cell is held out."""
    found = []
    for split in splits:
        if UNASSIGNED not in truth[split.test]:
            raise ScfmError(f"--novel: of {', '.join(novel)} no cell is held out (seed {split.seed})")
        train = split.train[truth[split.train] != UNASSIGNED]
        protocol = f"{split.protocol}; no training cell is of {', '.join(novel)}, which should be called {UNASSIGNED}"
        found.append(replace(split, train=train, protocol=protocol))
    return found


def frozen_splits(file: str, adata: AnnData) -> list[Split]:
    """Return the splits of a file that `save_splits` wrote. Raises ScfmError where it is of other cells, or edited."""
    if not Path(file).is_file():
        raise ScfmError(f"--splits {file}: there is no such file; a report's splits.json is one")
    return load_splits(Path(file), adata.obs_names.tolist())
