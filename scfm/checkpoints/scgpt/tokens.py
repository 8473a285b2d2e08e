"""scGPT's tokens, which number the rows of its gene embedding, beside scfm's vocabulary, which orders them anew."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from scfm.checkpoints.gene_names import names_of, with_ensembl
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.data.vocabulary_files import (
    SCGPT_SPECIALS,
    lines_of,
    parse_json,
    read_text,
    scgpt_order,
    tokens_of_ids,
    vocabulary_of_tokens,
)
from scfm.errors import ScfmError

EOC = "<eoc>"


@dataclass(frozen=True)
class Tokens:
    """scGPT's tokens beside scfm's vocabulary.

    Attributes:
        vocabulary: scfm's.
        native_of: for every row of scGPT's embedding the vocabulary's index; -1 for a row that scfm has no entry for.
    """

    vocabulary: Vocabulary
    native_of: list[int]

    @classmethod
    def same_order(cls, vocabulary: Vocabulary) -> Tokens:
        """Return the tokens of a vocabulary in its own order."""
        return cls(vocabulary, list(range(len(vocabulary))))

    @cached_property
    def is_same_order(self) -> bool:
        return self.native_of == list(range(len(self.vocabulary)))

    @property
    def names(self) -> list[str]:
        """scGPT's tokens by row; a row without an entry is that of `<eoc>`."""
        native = names_of(self.vocabulary)
        return [native[i] if i >= 0 else EOC for i in self.native_of]

    def to_native(self, rows: Tensor) -> Tensor:
        """Bring the rows of an embedding into our order, (scGPT's tokens, D) -> (ours, D); not copied if they are."""
        if self.is_same_order:
            return rows
        row_of = [0] * len(self.vocabulary)
        for row, native in enumerate(self.native_of):
            if native >= 0:
                row_of[native] = row
        return rows.index_select(0, torch.tensor(row_of))

    def to_scgpt(self, rows: Tensor) -> Tensor:
        """Bring the rows of an embedding into scGPT's order, zeros where we have no entry; not copied if they are."""
        if self.is_same_order:
            return rows
        native_of = torch.tensor(self.native_of)
        ordered = rows.index_select(0, native_of.clamp(min=0))
        ordered[native_of < 0] = 0
        return ordered


def read_tokens(path: Path, n_rows: int, ensembl_of: Mapping[str, str] | None = None) -> Tokens:
    """Return scGPT's tokens.

    Special tokens that the file lacks are appended as scGPT's loaders do, as far as the embedding has rows for them.

    Args:
        path: vocab.json, {token: id}; or a text file with a token per line, numbered as scGPT numbers a list.
        n_rows: rows of the embedding.
        ensembl_of: symbol -> Ensembl id, for genes of which the token does not tell it.

    Raises:
        ScfmError: the file is no such vocabulary, or `<pad>` or `<cls>` is missing and has no row.
    """
    text = read_text(path)
    try:
        tokens = tokens_of_ids(parse_json(text)) if ".json" in path.suffixes else scgpt_order(lines_of(text))
        n_given = len(tokens)
        tokens += [special for special in SCGPT_SPECIALS if special not in tokens][: max(n_rows - n_given, 0)]
        for special in SCGPT_SPECIALS[:2]:
            if special not in tokens:
                raise ScfmError(
                    f"has no {special}, and its {n_given} tokens leave none of the {n_rows} rows of the gene embedding "
                    "for it; is it the vocabulary of this model?"
                )
        vocabulary, ids = vocabulary_of_tokens(tokens)
    except ScfmError as error:
        raise ScfmError(f"{path}: {error}") from error
    native_of = [-1] * len(tokens)
    entries: list[Gene] = []
    for entry, row in zip(vocabulary.entries, ids.tolist(), strict=True):
        if row < len(tokens):  # <eoc> is appended there even without a row
            native_of[row] = len(entries)
            entries.append(entry)
    return Tokens(with_ensembl(Vocabulary(entries), ensembl_of or {}), native_of)


def write_tokens(path: Path, tokens: Tokens) -> None:
    """Write scGPT's vocab.json."""
    path.write_text(json.dumps({token: row for row, token in enumerate(tokens.names)}, indent=1), encoding="utf-8")
