"""Per-gene conditions from a table: which pathway, family or other group a gene belongs to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm.data.vocabulary import Vocabulary
from scfm.errors import ScfmError


def read_gene_condition(path: Path, vocabulary: Vocabulary) -> tuple[NDArray[np.int64], list[str]]:
    """Return (V,) the condition index of every vocabulary entry, and the names behind the indices; 0 is "none".

    Args:
        path: tab-separated table with the columns `gene` (Ensembl id or symbol) and `condition`.
        vocabulary: the genes; special tokens and genes that the table lacks have condition 0.

    Raises:
        ScfmError: the table cannot be read, lacks a column, names no gene of the vocabulary, or names one twice.
    """
    if not path.is_file():
        raise ScfmError(f"{path}: no such gene condition table")
    table = pd.read_csv(path, sep="\t", dtype=str)
    if not {"gene", "condition"} <= set(table.columns):
        raise ScfmError(f"{path}: has the columns {list(table.columns)}; `gene` and `condition` are needed")
    names = table["gene"].tolist()
    ids = vocabulary.match(names, names)
    if not (ids >= 0).any():
        raise ScfmError(f"{path}: names no gene of the vocabulary, e.g. {names[:3]}; it holds {vocabulary.names[:3]}")
    matched = table[ids >= 0].assign(id=ids[ids >= 0])
    twice = matched.groupby("id")["condition"].nunique()
    if (twice > 1).any():
        gene = vocabulary.names[int(twice.index[twice > 1][0])]
        raise ScfmError(f"{path}: puts the gene {gene} into several conditions; a gene can have one")
    conditions = ["none", *sorted(set(matched["condition"]))]
    indices = np.zeros(len(vocabulary), np.int64)
    indices[matched["id"]] = [conditions.index(condition) for condition in matched["condition"]]
    return indices, conditions
