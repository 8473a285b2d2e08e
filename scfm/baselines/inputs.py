"""What a baseline reads from an AnnData: log expression by one rule, and labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from scfm.errors import ScfmError

if TYPE_CHECKING:
    import anndata
    from scipy.sparse import csr_matrix


def _values(adata: anndata.AnnData) -> tuple[csr_matrix, list[str]]:
    """Return raw.X where there is one, else X, and its gene names; refuse values that are neither counts nor logs."""
    from scipy.sparse import csr_matrix

    source = adata if adata.raw is None else adata.raw
    values = csr_matrix(source.X, dtype=np.float64, copy=True)
    if not np.isfinite(values.data).all():
        raise ScfmError("the expression matrix holds NaN or infinite values; mend or drop those cells")
    if (values.data < 0).any():
        raise ScfmError(
            "the expression matrix holds negative values, so it was scaled; "
            "put counts or log-normalised values into .raw or .X"
        )
    return values, [str(gene) for gene in source.var_names]


def _are_counts(values: csr_matrix) -> bool:
    return bool((values.data == np.rint(values.data)).all())


@dataclass(frozen=True)
class ExpressionRule:
    """How training cells were read, so that held-out cells are read alike.

    Counts are scaled to 10,000 per cell and log1p-transformed; values that are normalised already are used as they are.
    Nothing is learned across cells but the gene list.

    Attributes:
        genes: the training genes, in column order.
        value_kind: whether the training matrix held `counts` or `normalised` values.
    """

    genes: list[str]
    value_kind: Literal["counts", "normalised"]

    @classmethod
    def learn(cls, adata: anndata.AnnData) -> ExpressionRule:
        """Read the rule off the training cells. Raises ScfmError where values are neither counts nor normalised."""
        values, genes = _values(adata)
        if len(set(genes)) < len(genes):
            raise ScfmError("gene names repeat; call adata.var_names_make_unique() first")
        return cls(genes, "counts" if _are_counts(values) else "normalised")

    def apply(self, adata: anndata.AnnData) -> csr_matrix:
        """Return log expression, (n cells, G training genes) float64 CSR, columns in training order.

        Raises ScfmError where a training gene is missing, or the values are of the other kind.
        """
        import pandas as pd

        values, genes = _values(adata)
        columns = pd.Index(genes).get_indexer(pd.Index(self.genes))
        if (columns < 0).any():
            missing = [gene for gene, column in zip(self.genes, columns, strict=True) if column < 0]
            shown = ", ".join(missing[:5])
            raise ScfmError(f"{len(missing)} of {len(self.genes)} training genes are not in these cells, e.g. {shown}")
        # all-zero cells are integers too, so they are at home in either kind
        if values.nnz and _are_counts(values) != (self.value_kind == "counts"):
            raise ScfmError(f"the training cells held {self.value_kind} values and these cells do not")
        if self.value_kind == "counts":
            totals = np.asarray(values.sum(axis=1)).ravel()
            values.data *= np.repeat(10_000 / np.maximum(totals, 1), np.diff(values.indptr))
            np.log1p(values.data, out=values.data)
        return values[:, columns].tocsr()


def read_labels(adata: anndata.AnnData, label: str) -> NDArray[np.str_]:
    """Return the labels of an obs column, (n,) strings. Raises ScfmError where it is absent or has gaps."""
    if label not in adata.obs:
        raise ScfmError(f"obs has no column {label!r}; it has {', '.join(map(str, adata.obs.columns)) or 'none'}")
    column = adata.obs[label]
    if gaps := int(column.isna().sum()):
        raise ScfmError(f"{gaps} of {len(column)} cells have no value in obs[{label!r}]; drop them or label them")
    return column.astype(str).to_numpy(dtype=str)
