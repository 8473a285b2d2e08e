"""From sources to a shard directory: `scfm prepare`.

The work lies in `scfm.data.building`: the sources are surveyed, a plan is made, units of rows are read and dealt to
buckets, copies of cells are found, and every bucket becomes a shard. Nothing stands at the destination before all is
written, memory is bounded, and a build that was stopped, however it was, goes on where it was.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from scfm.data.building.build import Build
from scfm.data.building.directory import building_directory
from scfm.data.building.options import BuildOptions, file_and_hash
from scfm.data.building.report import PreparedReport
from scfm.data.building.survey import labels_of
from scfm.data.building.workers import Crew
from scfm.data.census import SCHEME
from scfm.data.opening import absolute, find_sources
from scfm.data.shards import Codec
from scfm.errors import ScfmError

DATASET = "dataset_id"

if TYPE_CHECKING:
    from rich.progress import Progress


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    vocabulary: str | Path | None = None,
    genes: Sequence[str | Path] = (),
    obs: Sequence[str] = (),
    accept_normalised: bool = False,
    keep_order: bool = False,
    cells_per_shard: int = 100_000,
    codec: Codec | None = None,
    seed: int = 0,
    organism: str | None = None,
    obs_value_filter: str | None = None,
    where: Sequence[str] = (),
    min_genes: int = 0,
    min_counts: int = 0,
    max_cells_per_source: int | None = None,
    subsample: int | None = None,
    stratify: str | None = None,
    duplicates: Literal["drop", "keep"] = "drop",
    hold_out_by: str | None = None,
    hold_out_fraction: float | None = None,
    hold_out: Sequence[str] = (),
    workers: int | None = None,
    memory: float = 4.0,
    dask: str | None = None,
    part: str | None = None,
    merge: bool = False,
    restart: bool = False,
) -> PreparedReport | None:
    """Turn sources into a shard directory with a progress bar, print a table per source, and return its numbers.

    A build that was stopped, even killed, goes on where it was when the same command is given again.

    Args:
        sources: h5ad, 10x .h5 or loom files, folders with matrix.mtx, folders that are searched for all of these, or
            census:VERSION_OR_URI.
        out: directory to write; it must not exist, or be empty.
        vocabulary: vocab.json, or a text file with a gene per line; without it the union of all sources' genes.
        genes: tables of genes (HGNC, GENCODE ...), the most trusted first: id, symbol and old names are the same gene.
        obs: categorical obs columns to carry along; a source that lacks one gets missing values.
        accept_normalised: take values that are not counts as float32: quantile bins keep their order within a cell, and
            `data.values: log2` takes them as log2(1 + expression per 10,000).
        keep_order: keep the cells in the order of the sources (inference) instead of shuffling them (training).
        cells_per_shard: about how many cells a shard holds; fewer where cells are very wide.
        codec: `packed` (half the bytes) or `list` (plain columns of Hugging Face datasets); without it packed for
            counts, and list for normalised values, which have no packed form.
        seed: of the shuffling, and of all draws.
        organism: leave out cells and genes of others ("Homo sapiens" or NCBITaxon:9606); of a Census this one is read.
        obs_value_filter: cells of a Census to take: "tissue == 'lung' and is_primary_data == True".
        where: conditions on obs, COLUMN=VALUE or COLUMN!=VALUE; several values of a column are alternatives.
        min_genes: leave out cells that express fewer genes of the vocabulary.
        min_counts: leave out cells with fewer counts.
        max_cells_per_source: draw so many cells of a source that has more.
        subsample: draw so many cells of all that pass the conditions and the cap.
        stratify: obs column (or `source`) whose categories keep their shares in the subsample, one cell each at least.
        duplicates: `drop` all but the first of equal profiles, or `keep` them; either way they are counted.
        hold_out_by: obs column (or `source`) whose groups are for training or for validation, never both.
        hold_out_fraction: share of the cells to hold out, in groups that are drawn.
        hold_out: the groups to hold out, by name.
        workers: processes; without it as many as there are cores, and one for little work.
        memory: GiB that all processes together may use; where it does not do, there are fewer of them.
        dask: address of a Dask scheduler, whose workers make units and shards in place of processes.
        part: I/N makes the I-th of N parts of the first pass, on this machine; --merge then puts them together.
        merge: put the parts together; the other options are those of the parts.
        restart: begin anew where a build with other options or other sources was stopped.

    Returns:
        What was written; None for a part.

    Raises ScfmError, and writes nothing to `out`, where a source, an obs column, the vocabulary or the destination is
    unusable, or the build cannot go on.
    """
    out = Path(out)
    building = building_directory(out)
    specs = find_sources(sources)
    options = BuildOptions(
        sources=[absolute(spec) for spec in specs],
        vocabulary=[] if vocabulary is None else file_and_hash(vocabulary),
        genes=[file_and_hash(table) for table in genes],
        obs=_carried(obs, specs),
        accept_normalised=accept_normalised,
        keep_order=keep_order,
        cells_per_shard=cells_per_shard,
        codec=codec,
        seed=seed,
        organism=organism,
        obs_value_filter=obs_value_filter,
        where=list(where),
        min_genes=min_genes,
        min_counts=min_counts,
        max_cells_per_source=max_cells_per_source,
        subsample=subsample,
        stratify=stratify,
        duplicates=duplicates,
        hold_out_by=hold_out_by,
        hold_out_fraction=hold_out_fraction,
        hold_out=list(hold_out),
    )
    if workers is not None and workers < 1:
        raise ScfmError(f"workers: {workers} must be at least 1")
    share = _share(part, merge=merge, restart=restart)
    n_bytes = sum(Path(spec).stat().st_size for spec in options.sources if Path(spec).is_file())
    crew = Crew(workers, memory, n_bytes, dask)
    with _progress() as progress:
        build = Build(out, building, options, labels_of(specs), crew, progress)
        try:
            if share is not None:
                made = build.make_part(*share)
                print(f"part {part}: {made:,} units made in {building}; when all parts are, give --merge")
                return None
            report = build.make_all(merge=merge, restart=restart)
        except OSError as error:
            raise ScfmError(f"{out}: cannot be written ({error})") from error
    _print(report)
    return report


def _carried(obs: Sequence[str], specs: Sequence[str]) -> list[str]:
    """Return the obs columns to carry: those asked for, and which of its many data sets a cell of a Census is from."""
    needed = [DATASET] if any(spec.startswith(SCHEME) for spec in specs) else []
    return [*obs, *(name for name in needed if name not in obs)]


def _share(part: str | None, *, merge: bool, restart: bool) -> tuple[int, int] | None:
    if part is None:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ScfmError(f"--part {part}: write I/N, the I-th of N parts, such as 1/8 to 8/8")
    if merge or restart:
        raise ScfmError("--part goes with neither --merge, which comes after all parts, nor --restart, which ends them")
    return int(found[1]), int(found[2])


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _print(report: PreparedReport) -> None:
    from rich.console import Console

    Console().print(report.table())
