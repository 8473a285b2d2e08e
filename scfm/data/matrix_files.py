"""Count matrices of Cell Ranger, STARsolo and loom, read by scanpy and scipy: the whole matrix is in memory.

That is 8 bytes per value and once more while it is read: about 3 GB for 100,000 cells of 2,000 genes. Larger ones are
turned into h5ad first, which is read in blocks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from scipy.io import mmread
from scipy.sparse import csr_matrix

from scfm.data.sources import AnnDataSource, fingerprint_of
from scfm.errors import ScfmError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData

MATRICES = ("matrix.mtx.gz", "matrix.mtx")
FEATURES = ("features.tsv.gz", "features.tsv", "genes.tsv.gz", "genes.tsv")
BARCODES = ("barcodes.tsv.gz", "barcodes.tsv")
EXPRESSION = "Gene Expression"


class MatrixSource(AnnDataSource):
    """A file, or a folder of them, that was read into memory.

    Args:
        path: the file or folder.
        read: gives the cells.
        accept_normalised: whether values that are not counts may be used.
        parts: files of the folder that count.
    """

    def __init__(
        self,
        path: Path,
        read: Callable[[Path], AnnData],
        accept_normalised: bool = False,
        parts: tuple[Path, ...] = (),
    ) -> None:
        self.path, self.parts = path, parts
        # What is read from here on is the file of this fingerprint, or the build will see that it changed.
        self._fingerprint = fingerprint_of(str(path), path, parts)
        with _readable(path):
            adata = read(path)
        super().__init__(adata, accept_normalised, label=str(path))

    def fingerprint(self) -> dict[str, Any]:
        return fingerprint_of(self.label, self.path, self.parts)


def tenx_h5_source(path: Path, accept_normalised: bool = False) -> MatrixSource:
    """Open a Cell Ranger .h5; only gene expression is taken. Raises ScfmError for a damaged one."""
    return MatrixSource(path, _read_tenx_h5, accept_normalised)


def mtx_source(folder: Path, accept_normalised: bool = False) -> MatrixSource:
    """Open a folder of matrix.mtx, barcodes.tsv, and features.tsv or genes.tsv, gzipped or not (Cell Ranger, STARsolo).

    Only gene expression is taken. Raises ScfmError where one of them is missing or damaged.
    """
    parts = tuple(_part(folder, names) for names in (MATRICES, FEATURES, BARCODES))
    return MatrixSource(folder, lambda _: _read_mtx(*parts), accept_normalised, parts)


def loom_source(path: Path, accept_normalised: bool = False) -> MatrixSource:
    """Open a loom file: genes by the row attributes Gene and Accession, cells by CellID. Raises ScfmError as above."""
    try:
        import loompy  # noqa: F401  scanpy reads loom with it
    except ImportError as error:
        raise ScfmError(f"{path}: loom files are read with loompy; install it: pip install 'scfm[loom]'") from error
    return MatrixSource(path, _read_loom, accept_normalised)


def _part(folder: Path, names: tuple[str, ...]) -> Path:
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise ScfmError(f"{folder}: a 10x folder, but it has no {names[0]} (nor {', '.join(names[1:])})")
    return found[0]


def _read_tenx_h5(path: Path) -> AnnData:
    import scanpy

    adata = scanpy.read_10x_h5(path)
    adata.var = _with_unique_index(adata.var)
    return adata


def _read_mtx(matrix: Path, features: Path, barcodes: Path) -> AnnData:
    from anndata import AnnData

    values = csr_matrix(mmread(matrix).T)
    genes = pd.read_csv(features, sep="\t", header=None, dtype=str, keep_default_na=False)
    cells = pd.read_csv(barcodes, sep="\t", header=None, dtype=str, keep_default_na=False)
    if values.shape != (len(cells), len(genes)):
        raise ScfmError(
            f"{matrix}: {values.shape[1]:,} features x {values.shape[0]:,} barcodes, but {features.name} has "
            f"{len(genes):,} lines and {barcodes.name} {len(cells):,}; the files do not belong together"
        )
    var = pd.DataFrame({"gene_ids": genes[0].to_numpy(), "gene_symbols": genes[min(1, genes.shape[1] - 1)].to_numpy()})
    var.index = pd.Index(genes[0].to_numpy())
    adata = AnnData(values, obs=pd.DataFrame(index=cells[0].to_numpy()), var=_with_unique_index(var))
    return adata[:, (genes[2] == EXPRESSION).to_numpy()].copy() if genes.shape[1] > 2 else adata


def _read_loom(path: Path) -> AnnData:
    import scanpy

    adata = scanpy.read_loom(path)
    names = {"Accession": "gene_ids"} if "gene_ids" not in adata.var else {}
    adata.var = _with_unique_index(adata.var.rename(columns=names))
    return adata


def _with_unique_index(var: pd.DataFrame) -> pd.DataFrame:
    """Name the rows by their ids where several have one symbol, so that a message names the right one."""
    ids = var.get("gene_ids")
    if ids is None or var.index.is_unique or not ids.is_unique:
        return var
    return var.assign(gene_symbols=var.index).set_index(ids.to_numpy())


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            # several genes of one symbol are told apart by their ids
            warnings.filterwarnings("ignore", message="Variable names are not unique")
            yield
    except ScfmError:
        raise
    except Exception as error:  # the readers raise Exception itself, and whatever their parsers meet
        raise ScfmError(f"{path}: cannot be read; it is truncated, damaged or of another kind ({error})") from error
