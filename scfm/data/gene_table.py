"""Tables that say which names mean the same gene: HGNC's complete set, GENCODE's genes, or any pairs of id and symbol.

A gene has Ensembl ids, one symbol, and other names: its previous symbols and aliases, and what other tables call it.
A name that could mean several genes means none.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from scfm.data.genes import ID_COLUMNS, SYMBOL_COLUMNS
from scfm.data.vocabulary import Gene, GeneMatch, MatchedBy, Vocabulary, is_ensembl, strip_version
from scfm.errors import ScfmError

OTHER_NAMES = ("prev_symbol", "alias_symbol")  # HGNC's columns, names separated by |
SECOND_COPY = "_PAR_Y"  # GENCODE's mark of a gene of the pseudo-autosomal regions, on chromosome Y


class Kinship(IntEnum):
    """How a name leads to a gene, the surest first."""

    ID = 0
    SYMBOL = 1
    OTHER = 2


class Resolved(NamedTuple):
    """A gene of the table, by its place there, and how it was found."""

    gene: int
    by: Kinship


@dataclass
class KnownGene:
    """One gene and all its names; `ensembl` is None where no table gives an id, or several ids claim the symbol."""

    ensembl: str | None
    symbol: str | None
    other_ids: set[str] = field(default_factory=set)
    other_names: set[str] = field(default_factory=set)


class Row(NamedTuple):
    """What a line of a table says: the names of one gene, at least one of the first two."""

    ensembl: str | None
    symbol: str | None
    others: tuple[str, ...] = ()


class GeneTable:
    """Genes with their names, from one table or several.

    The first table that names a gene gives its symbol; what later ones call it are other names. An id that only a
    later table has belongs to the earlier gene whose name it bears there, as one id more.

    Args:
        tables: rows of each table, the most trusted first.
        files: where they came from, for provenance.
    """

    def __init__(self, tables: Iterable[Sequence[Row]], files: Sequence[str] = ()) -> None:
        self.files = list(files)
        self.genes: list[KnownGene] = []
        self._of_id: dict[str, Resolved] = {}
        self._of_symbol: defaultdict[str, set[int]] = defaultdict(set)
        self._of_other: defaultdict[str, set[int]] = defaultdict(set)
        for rows in tables:
            self._add(rows)

    def __len__(self) -> int:
        return len(self.genes)

    @classmethod
    def read(cls, paths: Sequence[str | Path]) -> GeneTable:
        """Read tables, the most trusted first; see `read_rows`. Raises ScfmError naming the file that is none."""
        return cls([read_rows(Path(path)) for path in paths], [str(path) for path in paths])

    def resolve(self, ensembl: str | None, symbol: str | None) -> Resolved | None:
        """Return the gene that is meant: by an Ensembl id that the table knows, else by the symbol; None if by neither.

        A symbol that several genes bear means none of them; so does another name, unless it is the symbol of one.
        """
        if ensembl:
            name = strip_version(ensembl)
            found = self._of_id.get(name)
            if found:
                return found
            copy_of = self._of_id.get(name.removesuffix(SECOND_COPY))
            if copy_of:
                return Resolved(copy_of.gene, Kinship.OTHER)
        return self._named(symbol) if symbol else None

    def is_ambiguous(self, symbol: str | None) -> bool:
        """Say whether a name could mean several genes of the table."""
        name = symbol or ""
        return len(self._of_symbol.get(name) or self._of_other.get(name) or ()) > 1

    def complete(
        self,
        match: GeneMatch,
        vocabulary: Vocabulary,
        ensembl: Sequence[str | None],
        symbols: Sequence[str | None],
    ) -> GeneMatch:
        """Return a match in which the genes that were not found are looked for by this table, the surest kin first."""
        entries, how = match.entries.copy(), match.by.copy()
        entries_of = self._entries(vocabulary)
        claims: defaultdict[tuple[MatchedBy, Kinship], defaultdict[int, list[int]]]
        claims = defaultdict(lambda: defaultdict(list))
        for column in np.flatnonzero(entries < 0).tolist():
            found = self.resolve(ensembl[column], symbols[column])
            held, kinship = entries_of.get(found.gene, ([], None)) if found else ([], None)
            if found and len(held) == 1:
                by = MatchedBy.ALIAS if Kinship.OTHER in (found.by, kinship) else MatchedBy.TABLE
                claims[by, found.by][held[0]].append(column)
            elif len(held) > 1 or (found is None and self.is_ambiguous(symbols[column])):
                how[column] = MatchedBy.AMBIGUOUS
        taken = set(entries[entries >= 0].tolist())
        for (by, _), claimed in sorted(claims.items()):
            for entry, columns in claimed.items():
                # The same name twice is the same gene twice, as it is without a table.
                names = {strip_version(ensembl[column] or "") or symbols[column] for column in columns}
                if entry in taken:
                    how[columns] = MatchedBy.TAKEN
                elif len(names) > 1:
                    how[columns] = MatchedBy.AMBIGUOUS
                else:
                    entries[columns], how[columns] = entry, by
            taken.update(claimed)
        return GeneMatch(entries, how)

    def _entries(self, vocabulary: Vocabulary) -> dict[int, tuple[list[int], Kinship]]:
        """Return gene -> its surest entries in a vocabulary, and how sure they are."""
        found: defaultdict[int, defaultdict[Kinship, list[int]]] = defaultdict(lambda: defaultdict(list))
        for entry, gene in enumerate(vocabulary.entries[: vocabulary.n_genes]):
            resolved = self.resolve(gene.ensembl, gene.symbol)
            if resolved is not None:
                found[resolved.gene][resolved.by].append(entry)
        return {gene: (by[min(by)], min(by)) for gene, by in found.items()}

    def canonical(self, genes: Sequence[Gene]) -> list[Gene]:
        """Return one source's genes with the table's id and symbol in place of a symbol alone.

        A name is kept where another gene of the source is, or may be, the same one: they are not to become one.
        """
        resolved = [self.resolve(gene.ensembl, gene.symbol) for gene in genes]
        claims = Counter(found.gene for found in resolved if found)
        named = []
        for gene, found in zip(genes, resolved, strict=True):
            known = self.genes[found.gene] if found and claims[found.gene] == 1 else None
            named.append(Gene.of(known.ensembl, known.symbol) if known and not gene.ensembl else gene)
        return named

    def _named(self, name: str) -> Resolved | None:
        for owners, kinship in ((self._of_symbol, Kinship.SYMBOL), (self._of_other, Kinship.OTHER)):
            genes = owners.get(name)
            if genes:
                return Resolved(next(iter(genes)), kinship) if len(genes) == 1 else None
        return None

    def _add(self, rows: Sequence[Row]) -> None:
        # Whom a name belongs to is asked of the tables before this one: its own rows must not depend on their order.
        owners = [self._owner(row) for row in rows]
        owned = set(self._of_symbol)
        bearers = Counter(symbol for ensembl, symbol in {row[:2] for row in rows} if ensembl not in self._of_id)
        for row, owner in zip(rows, owners, strict=True):
            if row.ensembl in self._of_id:  # by a row of this table, if not of one before
                owner = self._of_id[row.ensembl].gene
            if owner is None:
                owner = len(self.genes)
                self.genes.append(KnownGene(row.ensembl, row.symbol))
            gene = self.genes[owner]
            if gene.ensembl is None and row.ensembl and bearers[row.symbol] == 1:
                gene.ensembl = row.ensembl
            if gene.symbol is None and row.symbol not in owned:
                gene.symbol = row.symbol
            gene.other_ids |= {row.ensembl} - {gene.ensembl} if row.ensembl else set()
            gene.other_names |= {name for name in (row.symbol, *row.others) if name and name != gene.symbol}
            self._index(owner)

    def _owner(self, row: Row) -> int | None:
        if row.ensembl in self._of_id:
            return self._of_id[row.ensembl].gene
        found = self._named(row.symbol) if row.symbol else None
        # A row without id and another symbol is a gene of its own, even where an earlier table has that as an alias.
        return found.gene if found and (row.ensembl or found.by is Kinship.SYMBOL) else None

    def _index(self, at: int) -> None:
        gene = self.genes[at]
        if gene.ensembl:
            self._of_id[gene.ensembl] = Resolved(at, Kinship.ID)
        for name in gene.other_ids:
            self._of_id[name] = Resolved(at, Kinship.OTHER)
        if gene.symbol:
            self._of_symbol[gene.symbol].add(at)
        for name in gene.other_names:
            self._of_other[name].add(at)


def read_rows(path: Path) -> list[Row]:
    """Read a table of genes: tab-separated, `.csv` or `.parquet`, plain or gzipped.

    The first of the columns that name ids (ensembl_gene_id, gene_id ...) and symbols (symbol, gene_name ...) are read,
    and HGNC's prev_symbol, alias_symbol and status where they are there.

    Raises:
        ScfmError: the file cannot be read, has no such columns, or names no gene.
    """
    table = _read(path)
    id_column = next((name for name in ID_COLUMNS if name in table), None)
    symbol_column = next((name for name in SYMBOL_COLUMNS if name in table), None)
    if id_column is None or symbol_column is None:
        raise ScfmError(
            f"{path}: a gene table needs a column of Ensembl ids ({', '.join(ID_COLUMNS)}) and one of symbols "
            f"({', '.join(SYMBOL_COLUMNS)}); this one has {', '.join(map(str, table.columns[:8]))}. "
            "scripts/data/download_gene_tables.py fetches HGNC's and GENCODE's"
        )
    if "status" in table:
        table = table[table["status"] == "Approved"]  # withdrawn names would make current ones ambiguous
    others = [table[name] if name in table else [""] * len(table) for name in OTHER_NAMES]
    rows = []
    for name, symbol, *lists in zip(table[id_column], table[symbol_column], *others, strict=True):
        # GENCODE repeats the id where a gene has no symbol.
        row = Row(
            ensembl=strip_version(name).removesuffix(SECOND_COPY) if is_ensembl(name) else None,
            symbol=symbol if symbol and not is_ensembl(symbol) else None,
            others=tuple(other for names in lists for other in names.split("|") if other),
        )
        rows += [row] if row.ensembl or row.symbol else []
    if not any(row.ensembl for row in rows):
        raise ScfmError(f"{path}: column {id_column} holds no Ensembl id")
    if not any(row.symbol for row in rows):
        raise ScfmError(f"{path}: column {symbol_column} holds no symbol")
    return rows


def _read(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise ScfmError(f"{path}: there is no such gene table")
    try:
        if ".parquet" in path.suffixes:
            table = pd.read_parquet(path)
        else:
            # Genes can be called NA or NAN: nothing but an empty field is missing.
            separator = "," if ".csv" in path.suffixes else "\t"
            table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    except (OSError, EOFError, ValueError) as error:
        raise ScfmError(f"{path}: cannot be read as a gene table ({error})") from error
    return table.fillna("").astype(str).apply(lambda column: column.str.strip())
