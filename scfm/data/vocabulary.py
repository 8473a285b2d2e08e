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
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scfm.errors import ScfmError

if TYPE_CHECKING:
    from scfm.data.gene_table import GeneTable

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


def is_special(name: str) -> bool:
    """Say whether a name has the form of a special token: `<...>`."""
    return len(name) > 2 and name.startswith("<") and name.endswith(">")


class MatchedBy(IntEnum):
    """How a gene of a source was found in a vocabulary, or why it was not."""

    ID = 0
    SYMBOL = 1
    TABLE = 2  # its id is the symbol's, or its symbol the id's, by a gene table
    ALIAS = 3  # a gene table has one of the two names as a previous symbol, an alias or a second id
    UNKNOWN = 4  # the vocabulary has no such gene
    AMBIGUOUS = 5  # the name, or the entry it leads to, could be that of several genes
    TAKEN = 6  # another gene of the source has the entry with better right


@dataclass(frozen=True)
class GeneMatch:
    """Where the genes of a source stand in a vocabulary.

    Attributes:
        entries: (genes,) entry of each, -1 for one that is left out.
        by: (genes,) a MatchedBy of each.
    """

    entries: NDArray[np.int32]
    by: NDArray[np.int8]


@dataclass(frozen=True)
class Vocabulary:
    """Ordered genes, then the special tokens; the place in the list is the id that models and shards store.

    The special tokens are `<pad>`, `<cls>`, and any others of the form `<...>` that a model brings along.
    Raises ScfmError where an id stands there twice or the special tokens are not the last entries.
    """

    entries: list[Gene]

    def __post_init__(self) -> None:
        ids = [gene.id for gene in self.entries]
        specials = ids[ids.index(SPECIALS[0]) :] if SPECIALS[0] in ids else []
        if tuple(specials[: len(SPECIALS)]) != SPECIALS or not all(map(is_special, specials)):
            raise ScfmError(
                f"a vocabulary must end with {', '.join(SPECIALS)} and such further tokens as <...>; "
                f"this one ends with {(specials or ids)[-3:]}"
            )
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

    @cached_property
    def n_genes(self) -> int:
        return next(i for i, gene in enumerate(self.entries) if gene.id == SPECIALS[0])

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
        """Ensembl id to entry; scGPT lists a few ids twice, with and without version: the one without is meant."""
        entry_of: dict[str, int] = {}
        for i, gene in enumerate(self.entries):
            if gene.ensembl and (gene.ensembl not in entry_of or gene.id == gene.ensembl):
                entry_of[gene.ensembl] = i
        return entry_of

    @cached_property
    def _by_symbol(self) -> dict[str, int]:
        """Symbol to entry; an ambiguous symbol means the entry that has no Ensembl id, where there is one."""
        return {
            gene.symbol: i
            for i, gene in enumerate(self.entries)
            if gene.symbol and (gene.symbol not in self.ambiguous_symbols or gene.ensembl is None)
        }

    def match(
        self, ensembl: Sequence[str | None], symbols: Sequence[str | None], table: GeneTable | None = None
    ) -> NDArray[np.int32]:
        """Return the entry of each gene of a source, -1 for a gene that is not here; see `matching`."""
        return self.matching(ensembl, symbols, table).entries

    def matching(
        self, ensembl: Sequence[str | None], symbols: Sequence[str | None], table: GeneTable | None = None
    ) -> GeneMatch:
        """Return the entry of each gene of a source: by Ensembl id (any version), else by symbol, else by the table.

        Two different Ensembl ids meet by symbol only where the source does not also hold the entry's own id:
        an id that a newer annotation replaced is found, a second gene of the same name is not added to the first.

        A table adds what it knows to be the same gene: the id of a symbol or the symbol of an id, then previous symbols
        and aliases. Through a table no two genes of a source ever become one: an entry that another gene of the source
        has already is left to that one, and one that several claim with equal right goes to none.

        Args:
            ensembl: Ensembl id of each gene of the source, None where unknown.
            symbols: symbol of each gene, None where unknown.
            table: names that mean the same gene.
        """
        matched = np.array([self._by_ensembl.get(strip_version(e), -1) if e else -1 for e in ensembl], np.int32)
        how = np.where(matched >= 0, MatchedBy.ID, MatchedBy.UNKNOWN).astype(np.int8)
        taken = set(matched[matched >= 0].tolist())
        for column in np.flatnonzero(matched < 0).tolist():
            symbol = symbols[column]
            entry = self._by_symbol.get(symbol, -1) if symbol else -1
            if entry in taken and ensembl[column] and self.entries[entry].ensembl:
                how[column] = MatchedBy.TAKEN
            elif entry >= 0:
                matched[column], how[column] = entry, MatchedBy.SYMBOL
            elif symbol in self.ambiguous_symbols:
                how[column] = MatchedBy.AMBIGUOUS
        match = GeneMatch(matched, how)
        return match if table is None else table.complete(match, self, ensembl, symbols)

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
            return cls.of_list(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ScfmError(f"{path}: there is no such vocabulary file") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ScfmError(f"{path}: not JSON ({error})") from error
        except ScfmError as error:
            raise ScfmError(f"{path}: {error}") from error

    @classmethod
    def of_list(cls, listed: Any) -> Vocabulary:
        """Return the vocabulary of the content of a `vocab.json`. Raises ScfmError where it is something else."""
        if not isinstance(listed, list) or not all(_is_entry(entry) for entry in listed):
            raise ScfmError("expected a list of {id, ensembl, symbol}, as `scfm prepare` writes vocab.json")
        return cls([Gene(**entry) for entry in listed])

    def _plain(self) -> list[dict[str, str | None]]:
        return [{"id": gene.id, "ensembl": gene.ensembl, "symbol": gene.symbol} for gene in self.entries]


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and set(entry) == {"id", "ensembl", "symbol"}
        and isinstance(entry["id"], str)
        and all(entry[key] is None or isinstance(entry[key], str) for key in ("ensembl", "symbol"))
    )
