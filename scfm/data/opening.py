"""What kind of source a path or uri is, and opening it: the one place that knows all kinds.

cells.h5ad                      h5ad, read in blocks
filtered_feature_bc_matrix.h5   Cell Ranger, read into memory
filtered_feature_bc_matrix/     matrix.mtx with barcodes and features, read into memory
cells.loom                      loom, read into memory
census:2025-11-08               a release of the CELLxGENE Census, read in blocks from S3
census:/data/soma               the same SOMA on a disk, or at any uri that TileDB opens
folder/                         all files and 10x folders below it
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from scfm.data.census import SCHEME, CensusSource, census_place
from scfm.data.h5ad import H5adSource
from scfm.data.matrix_files import MATRICES, loom_source, mtx_source, tenx_h5_source
from scfm.data.sources import Source, expect_readable
from scfm.errors import ScfmError

Kind = Literal["h5ad", "10x h5", "10x mtx", "loom", "census", "folder"]
ALL_BARCODES = ("raw_feature_bc_matrix", "raw_gene_bc_matrices")
SUFFIXES = (".h5ad", ".h5", ".loom")


def find_sources(named: Sequence[str | Path]) -> list[str]:
    """Return every source that is named, folders searched, in a settled order.

    A search leaves out Cell Ranger's matrices of all barcodes (raw_feature_bc_matrix), nearly all of which are empty
    droplets, a matrix folder beside the .h5 of the same name, and .h5 files that hold no matrix. Raises ScfmError
    where nothing is found, or a source is named twice.
    """
    if not named:
        raise ScfmError("no source is named; name files, folders that hold them, or census:VERSION")
    found: list[str] = []
    for spec in map(str, named):
        if spec.startswith(SCHEME):
            found.append(SCHEME + census_place(spec))
            continue
        kind = kind_of(spec)
        below = sorted(map(str, _below(Path(spec)))) if kind == "folder" else [spec]
        if not below:
            raise ScfmError(f"{spec}: the folder holds no .h5ad, no .loom, no 10x .h5 and no folder with matrix.mtx")
        found += below
    places = Counter(spec if spec.startswith(SCHEME) else str(Path(spec).resolve()) for spec in found)
    twice = [place for place, n in places.items() if n > 1]
    if twice:
        raise ScfmError(f"named more than once among the sources: {', '.join(twice)}")
    return found


def absolute(spec: str) -> str:
    """Return a source's name that holds in any working directory."""
    return spec if spec.startswith(SCHEME) else str(Path(spec).absolute())


def open_source(
    spec: str | Path,
    accept_normalised: bool = False,
    organism: str | None = None,
    obs_value_filter: str | None = None,
    cache: Path | None = None,
) -> Source:
    """Open a source of any kind; use it in a `with` statement.

    Args:
        spec: path or uri, of one source: see the table above.
        accept_normalised: whether values that are not counts may be used.
        organism: the organism wanted, by taxon id or Latin name; a Census needs one and takes Homo sapiens without.
        obs_value_filter: the cells of a Census to take, as its users write it; other sources do not look at it.
        cache: existing folder where a Census source keeps which cells it takes; without it every opening asks again.

    Raises:
        ScfmError: there is no such source, it is of no known kind, damaged, or a folder of several.
    """
    spec = str(spec)
    kind = kind_of(spec)
    if kind == "census":
        return CensusSource(spec, accept_normalised, organism or "Homo sapiens", obs_value_filter, cache)
    path = Path(spec)
    if kind == "folder":
        raise ScfmError(f"{spec}: a folder; here a single source is needed: a file, or a folder with matrix.mtx in it")
    if kind == "10x mtx":
        return mtx_source(path, accept_normalised)
    if kind == "loom":
        return loom_source(path, accept_normalised)
    if kind == "10x h5":
        return tenx_h5_source(path, accept_normalised)
    return H5adSource(path, accept_normalised, organism)


def kind_of(spec: str) -> Kind:
    """Return the kind of a source; what an HDF5 file is, its content says, not its name. Raises ScfmError for none."""
    if spec.startswith(SCHEME):
        return "census"
    if "://" in spec:
        raise ScfmError(f"{spec}: files are read from disks; of uris, only those of a Census are: {SCHEME}{spec}")
    path = Path(spec)
    if path.is_dir():
        if any((path / name).is_file() for name in MATRICES):
            return "10x mtx"
        if (path / "__group").is_dir() or (path / "__tiledb_group.tdb").exists():
            raise ScfmError(f"{spec}: a TileDB group; where it has the layout of the Census, write {SCHEME}{spec}")
        return "folder"
    if path.name in MATRICES:
        raise ScfmError(f"{spec}: name the folder, {path.parent}, which holds barcodes and features too")
    return _kind_of_hdf5(path) or "h5ad"  # which says what is wrong with a file that is none


def _below(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if any(part in ALL_BARCODES for part in path.relative_to(folder).parts) or path.stem in ALL_BARCODES:
            continue
        if path.name in MATRICES:
            if not path.parent.with_name(f"{path.parent.name}.h5").is_file():
                yield path.parent
        elif path.suffix in SUFFIXES and path.is_file() and (path.suffix != ".h5" or _kind_of_hdf5(path)):
            yield path


def _kind_of_hdf5(path: Path) -> Kind | None:
    import h5py

    if not path.is_file():
        return None
    expect_readable(path)
    if not h5py.is_hdf5(path):
        return None
    try:
        with h5py.File(path, "r") as file:
            if "obs" in file and "var" in file:
                return "h5ad"
            if isinstance(file.get("matrix"), h5py.Dataset) and "row_attrs" in file:
                return "loom"
            # Cell Ranger 3 has one group, matrix; Cell Ranger 2 one per genome
            groups = [group for group in file.values() if isinstance(group, h5py.Group)]
            is_tenx = any("barcodes" in group and "indptr" in group for group in groups)
    except OSError as error:
        raise ScfmError(f"{path}: cannot be read; the file is truncated or damaged ({error})") from error
    return "10x h5" if is_tenx else None
