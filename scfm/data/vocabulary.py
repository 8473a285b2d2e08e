"""The genes that a model knows: an ordered list of identities, the special tokens last.

A gene is its unversioned Ensembl id where one is known, else its symbol. Sources name genes either way, so matching
asks for the Ensembl id first and for the symbol second.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scfm.errors import ScfmError

SPECIALS = ("<pad>", "<cls>")

ENSEMBL_ID = re.compile(r"ENS[A-Z]*\d{6,}(\.\d+)?(_PAR_Y)?")
# Only ids that start with ENS carry a version: the dot of a symbol such as AC005606.1 belongs to its name.
ENSEMBL_VERSION = re.compile(r"\.\d+(?=$|_PAR_Y$)")


@dataclass(frozen=True)
class Gene:
    """One gene, or a special token.

    Attributes:
        id: unversioned Ensembl id where one is known, else the symbol; unique in a vocabulary.
        ensembl: unversioned Ensembl id.
        symbol: gene symbol.
    """

    id: str
    ensembl: str | None = None
    symbol: str | None = None

    @classmethod
    def of(cls, ensembl: str | None, symbol: str | None) -> Gene:
        """Return the gene with these names, at least one of which is known."""
        name = ensembl or symbol
        if name is None:
            raise ValueError("a gene needs an Ensembl id or a symbol")
        return cls(name, ensembl, symbol)


def is_ensembl(name: str) -> bool:
    """Say whether a name has the form of an Ensembl id, with or without version."""
    return name.startswith("ENS") and ENSEMBL_ID.fullmatch(name) is not None


def strip_version(name: str) -> str:
    """Return an Ensembl id without its version; any other name as it is."""
    return ENSEMBL_VERSION.sub("", name) if name.startswith("ENS") else name


@dataclass(frozen=True)
class Vocabulary:
    """Ordered genes, then the special tokens; the place in the list is the id that models and shards store.

    Raises ScfmError where an id stands there twice or the special tokens are not the last entries.
    """

    entries: list[Gene]

    def __post_init__(self) -> None:
        ids = [gene.id for gene in self.entries]
        if tuple(ids[-len(SPECIALS) :]) != SPECIALS:
            raise ScfmError(f"a vocabulary must end with {', '.join(SPECIALS)}; this one ends with {ids[-2:]}")
        twice = [name for name, n in Counter(ids).items() if n > 1]
        if twice:
            raise ScfmError(f"{len(twice)} ids stand in the vocabulary more than once, e.g. {twice[:3]}")

    @classmethod
    def from_genes(cls, genes: Iterable[Gene]) -> Vocabulary:
        """Return the union of genes, sorted by id, whatever their order.

        A gene seen with its Ensembl id in one place and by symbol only in another becomes one entry. Where several
        Ensembl ids share a symbol, the symbol alone cannot say which is meant, so it stays an entry of its own.
        """
        symbols: defaultdict[str, Counter[str]] = defaultdict(Counter)
        bare: set[str] = set()
        for gene in genes:
            if gene.ensembl is not None:
                symbols[gene.ensembl].update([gene.symbol] if gene.symbol else [])
            else:
                bare.add(gene.id)
        # Sources can give one Ensembl id several symbols (renamed genes): the most frequent, then the first by name.
        identified = [
            Gene.of(ensembl, min(seen, key=lambda symbol: (-seen[symbol], symbol), default=None))
            for ensembl, seen in symbols.items()
        ]
        owners = Counter(gene.symbol for gene in identified)
        by_symbol_only = [Gene.of(None, symbol) for symbol in bare if owners[symbol] != 1]
        merged = sorted(identified + by_symbol_only, key=lambda gene: gene.id)
        return cls(merged + [Gene(special) for special in SPECIALS])

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def n_genes(self) -> int:
        return len(self.entries) - len(SPECIALS)

    @property
    def pad(self) -> int:
        return self.n_genes + SPECIALS.index("<pad>")

    @property
    def cls(self) -> int:
        return self.n_genes + SPECIALS.index("<cls>")

    @cached_property
    def names(self) -> list[str]:
        """Symbol of each entry, its id where it has none: for display, not unique."""
        return [gene.symbol or gene.id for gene in self.entries]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the entries: two vocabularies are the same where it is."""
        canonical = json.dumps(self._plain(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @cached_property
    def gene_keys(self) -> NDArray[np.uint64]:
        """(n_genes,) hash of each gene's id, the same in every vocabulary that holds the gene."""
        digests = [hashlib.blake2b(gene.id.encode(), digest_size=8).digest() for gene in self.entries[: self.n_genes]]
        return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)

    @cached_property
    def ambiguous_symbols(self) -> frozenset[str]:
        """Symbols that several entries share: alone they do not tell a gene."""
        return frozenset(symbol for symbol, n in Counter(g.symbol for g in self.entries).items() if symbol and n > 1)

    @cached_property
    def _by_ensembl(self) -> dict[str, int]:
        return {gene.ensembl: i for i, gene in enumerate(self.entries) if gene.ensembl}

    @cached_property
    def _by_symbol(self) -> dict[str, int]:
        """Symbol to entry; an ambiguous symbol means the entry that has no Ensembl id, where there is one."""
        return {
            gene.symbol: i
            for i, gene in enumerate(self.entries)
            if gene.symbol and (gene.symbol not in self.ambiguous_symbols or gene.ensembl is None)
        }

    def match(self, ensembl: Sequence[str | None], symbols: Sequence[str | None]) -> NDArray[np.int32]:
        """Return the entry of each gene of a source: by Ensembl id (any version), else by symbol, else -1.

        Two different Ensembl ids meet by symbol only where the source does not also hold the entry's own id:
        an id that a newer annotation replaced is found, a second gene of the same name is not added to the first.
        """
        matched = np.array([self._by_ensembl.get(strip_version(e), -1) if e else -1 for e in ensembl], np.int32)
        taken = set(matched[matched >= 0].tolist())
        for column in np.flatnonzero(matched < 0).tolist():
            symbol = symbols[column]
            entry = self._by_symbol.get(symbol, -1) if symbol else -1
            rival = entry in taken and ensembl[column] and self.entries[entry].ensembl
            matched[column] = -1 if rival else entry
        return matched

    def save(self, path: Path) -> None:
        """Write `vocab.json`: an ordered list of {id, ensembl, symbol}."""
        lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in self._plain())
        written = path.with_name(path.name + ".tmp")
        written.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        os.replace(written, path)

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read `vocab.json`. Raises ScfmError naming the file where it does not hold a vocabulary."""
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ScfmError(f"{path}: there is no such vocabulary file") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ScfmError(f"{path}: not JSON ({error})") from error
        if not isinstance(listed, list) or not all(_is_entry(entry) for entry in listed):
            raise ScfmError(f"{path}: expected a list of {{id, ensembl, symbol}}, as `scfm prepare` writes vocab.json")
        try:
            return cls([Gene(**entry) for entry in listed])
        except ScfmError as error:
            raise ScfmError(f"{path}: {error}") from error

    def _plain(self) -> list[dict[str, str | None]]:
        return [{"id": gene.id, "ensembl": gene.ensembl, "symbol": gene.symbol} for gene in self.entries]


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and set(entry) == {"id", "ensembl", "symbol"}
        and isinstance(entry["id"], str)
        and all(entry[key] is None or isinstance(entry[key], str) for key in ("ensembl", "symbol"))
    )


def read_vocabulary(path: Path) -> Vocabulary:
    """Read a `vocab.json`, or a text file with one Ensembl id or symbol per line, whose order is kept.

    Raises ScfmError where the file is missing, holds no gene, or names one twice.
    """
    if path.suffix == ".json":
        return Vocabulary.load(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ScfmError(f"{path}: there is no such vocabulary file") from None
    except UnicodeDecodeError as error:
        raise ScfmError(f"{path}: neither a vocab.json nor a text file with one gene per line ({error})") from error
    names = [line.strip() for line in lines if line.strip() and line.strip() not in SPECIALS]
    if not names:
        raise ScfmError(f"{path}: holds no gene; expected one Ensembl id or symbol per line")
    genes = [Gene.of(strip_version(name), None) if is_ensembl(name) else Gene.of(None, name) for name in names]
    try:
        return Vocabulary(genes + [Gene(special) for special in SPECIALS])
    except ScfmError as error:
        raise ScfmError(f"{path}: {error}") from error
