"""Given vectors of genes (gene2vec): a matrix and the names of its rows, aligned with a vocabulary by name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scfm.data.vocabulary import Vocabulary
from scfm.errors import ScfmError


def read_gene_vectors(path: Path, vocabulary: Vocabulary, width: int) -> tuple[NDArray[np.float32], int]:
    """Return (V, width) the vector of every vocabulary entry, and how many genes have one; the others' are zeros.

    Args:
        path: `.npy` file of numbers, (rows, width); the names of its rows, a symbol or Ensembl id a line, stand beside
            it in a `.txt` file of the same name.
        vocabulary: the genes; a row is matched by its name, wherever it stands.
        width: of the model.

    Raises:
        ScfmError: a file is missing or damaged, the two do not belong together, the vectors are not of the model's
            width, a gene has several of them, or none has one.
    """
    key = "model.gene_table"
    matrix = read_matrix(path)
    if matrix.shape[1] != width:
        raise ScfmError(f"{key}: the vectors of {path} have {matrix.shape[1]} numbers, but model.width is {width}")
    names = read_names(path.with_suffix(".txt"))
    if len(names) != len(matrix):
        raise ScfmError(f"{key}: {path} has {len(matrix):,} rows, {path.with_suffix('.txt').name} {len(names):,} names")
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise ScfmError(f"{key}: {len(twice)} names stand in {path.with_suffix('.txt')} more than once: {twice[:3]}")
    entries = vocabulary.match(names, names)
    rows = np.flatnonzero((entries >= 0) & (entries < vocabulary.n_genes))
    if len(rows) == 0:
        raise ScfmError(
            f"{key}: {path} names no gene of the vocabulary, e.g. {names[:3]}; it holds {vocabulary.names[:3]}"
        )
    claims = Counter(entries[rows].tolist())
    shared = [vocabulary.names[entry] for entry, n in claims.items() if n > 1]
    if shared:
        raise ScfmError(f"{key}: {len(shared)} genes have several rows in {path}, under other names: {shared[:3]}")
    vectors = np.zeros((len(vocabulary), width), np.float32)
    vectors[entries[rows]] = matrix[rows]
    return vectors, len(rows)


def read_matrix(path: Path) -> NDArray[np.floating]:
    """Return the matrix of an .npy file. Raises ScfmError where there is none."""
    try:
        matrix = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ScfmError(f"model.gene_table: {path} cannot be read as .npy ({error})") from error
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or not np.issubdtype(matrix.dtype, np.floating):
        raise ScfmError(f"model.gene_table: {path} must hold a matrix of numbers, (genes, width)")
    if not np.isfinite(matrix).all():
        raise ScfmError(f"model.gene_table: {path} holds numbers that are not finite")
    return matrix


def read_names(path: Path) -> list[str]:
    """Return the lines of the file that names the rows. Raises ScfmError where there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ScfmError(
            f"model.gene_table: the names of its rows are needed in {path}, a gene a line ({error})"
        ) from error
    return [line.strip() for line in lines]
