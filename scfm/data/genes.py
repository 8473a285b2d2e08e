"""Which gene a column of a matrix holds, read from an AnnData's var."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm.data.organisms import NO_ORGANISMS
from scfm.data.vocabulary import is_ensembl, strip_version

ID_COLUMNS = ("ensembl_id", "gene_ids", "gene_id", "feature_id", "ensembl", "ensembl_ids", "ensembl_gene_id")
SYMBOL_COLUMNS = ("feature_name", "gene_symbol", "gene_symbols", "gene_name", "gene_names", "symbol")
KIND_COLUMNS = ("feature_biotype", "feature_reference")
SPIKE_IN = re.compile(r"ERCC-\d{5}")
VIRAL = "ENSSASG"  # genes of SARS-CoV-2, as CELLxGENE names them


def with_names_of(var: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Return `var` with the columns that describe genes taken from `other`, by index, where it lacks them.

    `raw.var` is often only an index while `var` says which Ensembl id it means.
    """
    missing = [name for name in (*ID_COLUMNS, *SYMBOL_COLUMNS, *KIND_COLUMNS) if name in other and name not in var]
    if not missing or not other.index.is_unique:
        return var
    return var.assign(**{name: other[name].reindex(var.index).to_numpy() for name in missing})


def genes_of(var: pd.DataFrame, organism: str | None = None) -> tuple[list[str | None], list[str | None]]:
    """Return the unversioned Ensembl id and the symbol of each row of var, None where unknown.

    The index gives the Ensembl id where it looks like one, else the first of ID_COLUMNS does that has one; the first of
    SYMBOL_COLUMNS gives the symbol, else the index. What is no gene of the organism (see `are_genes`) gets neither.
    """
    index = _names(pd.Series(var.index))
    ids = [index, *(_names(var[name]) for name in ID_COLUMNS if name in var)]
    symbols = [*(_names(var[name]) for name in SYMBOL_COLUMNS if name in var), index]
    ensembl = _first_known([strip_version(n) if n and is_ensembl(n) else None for n in column] for column in ids)
    symbol = _first_known([n if n and not is_ensembl(n) else None for n in column] for column in symbols)
    for row in np.flatnonzero(~are_genes(var, organism)):
        ensembl[row] = symbol[row] = None
    return ensembl, symbol


def keys_across(tables: Sequence[pd.DataFrame]) -> list[list[str | None]]:
    """Return of each of several var tables what names its rows alike in all: Ensembl ids, symbols where none is known.

    A symbol without an id stands for the id that the other tables give it, where they agree. None for a row that means
    the same gene as an earlier one of its table.
    """
    named = [(*genes_of(var), _names(pd.Series(var.index))) for var in tables]
    ids: dict[str, set[str]] = {}
    for ensembl, symbols, _ in named:
        for gene, symbol in zip(ensembl, symbols, strict=True):
            if gene and symbol:
                ids.setdefault(symbol, set()).add(gene)
    found: list[list[str | None]] = []
    for rows in named:
        keys: dict[str | None, int] = {}
        for row, (gene, symbol, name) in enumerate(zip(*rows, strict=True)):
            meant = ids.get(symbol, set()) if symbol else set()
            keys.setdefault(gene or (next(iter(meant)) if len(meant) == 1 else symbol or name), row)
        key_of = {row: key for key, row in keys.items()}
        found.append([key_of.get(row) for row in range(len(rows[0]))])
    return found


def are_genes(var: pd.DataFrame, organism: str | None = None) -> NDArray[np.bool_]:
    """(rows,) False for what is no gene of the organism: spike-ins, SARS-CoV-2, and genes of another organism.

    `feature_biotype` and `feature_reference` of the CELLxGENE schema say so, names like ERCC-00002 do anywhere. Where
    no row refers to the organism (its genes were mapped to orthologues, as schema 5 asked for) all references count.
    """
    index = [name or "" for name in _names(pd.Series(var.index))]
    genes = np.array([not SPIKE_IN.fullmatch(name) and not name.startswith(VIRAL) for name in index], bool)
    if "feature_biotype" in var:
        genes &= (var["feature_biotype"].astype(str) != "spike-in").to_numpy()
    if "feature_reference" in var:
        reference = var["feature_reference"].astype(str)
        genes &= ~reference.isin(NO_ORGANISMS).to_numpy()
        if (reference == organism).any():
            genes &= (reference == organism).to_numpy()
    return genes


def _names(column: pd.Series) -> list[str | None]:
    return [n.strip() or None if isinstance(n, str) else None if pd.isna(n) else str(n) for n in column.tolist()]


def _first_known(columns: Iterable[list[str | None]]) -> list[str | None]:
    first, *others = columns
    for other in others:
        first = [name or alternative for name, alternative in zip(first, other, strict=True)]
    return first
