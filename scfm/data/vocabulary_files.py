"""Files that name a model's genes: our vocab.json, scGPT's vocab.json, and plain lists."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scfm.data.vocabulary import SPECIALS, Gene, Vocabulary, is_ensembl, is_special, strip_version
from scfm.errors import ScfmError

SCGPT_SPECIALS = ("<pad>", "<cls>", "<eoc>")


def read_vocabulary(path: Path) -> Vocabulary:
    """Read a `vocab.json`, scGPT's too, or a text file with one Ensembl id or symbol per line, whose order is kept.

    Raises ScfmError where the file is missing, holds no gene, or names one twice.
    """
    text = read_text(path)
    try:
        if ".json" in path.suffixes:
            content = parse_json(text)
            of_scgpt = isinstance(content, dict)
            return vocabulary_of_tokens(tokens_of_ids(content))[0] if of_scgpt else Vocabulary.of_list(content)
        names = [name for name in lines_of(text) if name not in SPECIALS]
        if not names:
            raise ScfmError("holds no gene; expected one Ensembl id or symbol per line")
        genes = [Gene.of(*_names(name)) for name in names]
        return Vocabulary(genes + [Gene(special) for special in SPECIALS])
    except ScfmError as error:
        raise ScfmError(f"{path}: {error}") from error


def scgpt_tokens(path: Path) -> tuple[Vocabulary, NDArray[np.int64]]:
    """Read a vocabulary of scGPT in our order.

    Args:
        path: `vocab.json` ({token: id}), or a text file with a gene per line, whose ids follow `scgpt_order`; either
            may be gzipped. Special tokens that it lacks are appended as scGPT does.

    Returns:
        Genes by ascending id, then `<pad>`, `<cls>` and the other special tokens; and (V,) the id that each of these
        entries has in scGPT.

    Raises:
        ScfmError: the file is not such a vocabulary, names a token twice, or its ids are not 0 to n - 1.
    """
    text = read_text(path)
    try:
        tokens = tokens_of_ids(parse_json(text)) if ".json" in path.suffixes else scgpt_order(lines_of(text))
        return vocabulary_of_tokens(tokens)
    except ScfmError as error:
        raise ScfmError(f"{path}: {error}") from error


def tokens_of_ids(id_of_token: Any) -> list[str]:
    """Return the tokens of a {token: id} mapping by id. Raises ScfmError unless the ids are 0 to n - 1, each once."""
    if not isinstance(id_of_token, dict) or not all(type(i) is int for i in id_of_token.values()):
        raise ScfmError("expected {token: id} with whole numbers as ids, as scGPT writes vocab.json")
    counts = Counter(id_of_token.values())
    twice = [i for i, n in counts.items() if n > 1]
    if twice:
        sharing = [token for token, i in id_of_token.items() if i == twice[0]]
        raise ScfmError(f"{len(twice)} ids stand for several tokens, e.g. {twice[0]} for {', '.join(sharing[:3])}")
    gaps = sorted(set(range(len(counts))) - set(counts))
    if gaps:
        raise ScfmError(
            f"the ids of {len(counts)} tokens must be 0 to {len(counts) - 1} without gaps, but {gaps[0]} is missing; "
            "ids are rows of the gene embedding: take the vocab.json that was saved beside the checkpoint"
        )
    return sorted(id_of_token, key=id_of_token.__getitem__)


def scgpt_order(tokens: Sequence[str], specials: Sequence[str] = (), specials_first: bool = False) -> list[str]:
    """Return a list's distinct tokens by the ids that scGPT gives them.

    Args:
        tokens: names, repeated ones too: the most frequent come first, equally frequent ones by code point.
        specials: tokens that stand apart in this order, each once, whether or not they are among `tokens`.
        specials_first: whether the special tokens have the first ids or the last.
    """
    counts = Counter(token for token in tokens if token not in specials)
    ordered = sorted(counts, key=lambda token: (-counts[token], token))
    return [*specials, *ordered] if specials_first else [*ordered, *specials]


def vocabulary_of_tokens(tokens: Sequence[str]) -> tuple[Vocabulary, NDArray[np.int64]]:
    """Return the vocabulary of tokens in order of their scGPT ids, and (V,) the scGPT id of each of its entries.

    A token stays the id of its entry, an Ensembl id with its version too: it is the name that the checkpoint goes by.
    """
    known = set(tokens)
    complete = [*tokens, *(special for special in SCGPT_SPECIALS if special not in known)]
    genes = [Gene(token, *_names(token)) for token in complete if not is_special(token)]
    if not genes:
        raise ScfmError("holds no gene, only special tokens")
    others = [token for token in complete if is_special(token) and token not in SPECIALS]
    vocabulary = Vocabulary(genes + [Gene(token) for token in (*SPECIALS, *others)])
    id_of_token = {token: i for i, token in enumerate(complete)}
    return vocabulary, np.array([id_of_token[entry.id] for entry in vocabulary.entries], np.int64)


def _names(token: str) -> tuple[str | None, str | None]:
    return (strip_version(token), None) if is_ensembl(token) else (None, token)


def read_text(path: Path) -> str:
    """Return the text of a vocabulary file, which is gzipped where its name ends in .gz."""
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except FileNotFoundError:
        raise ScfmError(f"{path}: there is no such vocabulary file") from None
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise ScfmError(
            f"{path}: neither a vocab.json nor a text file with one gene per line, plain or gzipped ({error})"
        ) from error


def parse_json(text: str) -> Any:
    """Return the content of a JSON text. Raises ScfmError where it is none, or an object has a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except json.JSONDecodeError as error:
        raise ScfmError(f"not JSON ({error})") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]
    if twice:
        raise ScfmError(f"{len(twice)} names stand there more than once, e.g. {', '.join(twice[:3])}")
    return dict(pairs)


def lines_of(text: str) -> list[str]:
    """Return the names of a text with one per line."""
    return [line.strip() for line in text.splitlines() if line.strip()]
