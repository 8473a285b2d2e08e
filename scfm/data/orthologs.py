"""Cells of one organism in the genes of another, by a table of orthologs.

Only one-to-one orthologs are used: a gene whose table has several partners, on either side, means none of them. Genes
without a partner are dropped, and columns that mean the same gene are summed; both are counted and said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scfm.data.genes import genes_of, with_names_of
from scfm.data.vocabulary import Vocabulary, strip_version
from scfm.errors import ScfmError

if TYPE_CHECKING:
    from anndata import AnnData

IDS = "_ensembl"  # ends the name of a column of Ensembl ids
Names = tuple[Sequence[str | None], Sequence[str | None]]


@dataclass(frozen=True)
class Side:
    """The genes of one organism, one a pair: Ensembl ids, and symbols that one pair alone has."""

    organism: str
    of_id: dict[str, int]
    of_symbol: dict[str, int]

    def pairs_of(self, genes: Names) -> list[int]:
        """Return the pair of each gene, by Ensembl id, else by symbol; -1 for a gene that is in none."""
        pairs = []
        for ensembl, symbol in zip(*genes, strict=True):
            by_id = self.of_id.get(strip_version(ensembl), -1) if ensembl else -1
            pairs.append(by_id if by_id >= 0 or not symbol else self.of_symbol.get(symbol, -1))
        return pairs


class Orthologs:
    """One-to-one orthologs of two organisms.

    Args:
        first, second: the organisms; the same number is the same pair in both.
        n_pairs: one-to-one pairs.
        file: where they came from, for provenance.
    """

    def __init__(self, first: Side, second: Side, n_pairs: int, file: str) -> None:
        self.sides = (first, second)
        self.n_pairs = n_pairs
        self.file = file

    @classmethod
    def read(cls, path: str | Path) -> Orthologs:
        """Read a table, `.parquet`, `.csv` or tab-separated, of two organisms, e.g. `human`, `mouse`, `human_ensembl`,
        `mouse_ensembl`: a pair a line, symbols in the columns that are named as the organism, where there are such.

        Raises ScfmError for a file that cannot be read, has no such columns, or holds no one-to-one pair.
        """
        path = Path(path)
        table = read_table(path)
        organisms = [name.removesuffix(IDS) for name in table.columns if name.endswith(IDS)]
        if len(organisms) != 2:
            raise ScfmError(
                f"{path}: a table of orthologs has a column of Ensembl ids for each of two organisms, e.g. human{IDS} "
                f"and mouse{IDS}, and may have their symbols in columns human and mouse; this one has "
                f"{', '.join(map(str, table.columns[:8]))}"
            )
        ids = [table[organism + IDS].map(strip_version) for organism in organisms]
        pairs = pd.DataFrame({0: ids[0], 1: ids[1]}).drop_duplicates()
        pairs = pairs[(pairs[0] != "") & (pairs[1] != "")]
        single = ~pairs[0].duplicated(keep=False) & ~pairs[1].duplicated(keep=False)
        pairs = pairs[single]
        if not len(pairs):
            raise ScfmError(f"{path}: holds no one-to-one pair of orthologs")
        sides = []
        for k, organism in enumerate(organisms):
            symbols = table.loc[pairs.index, organism] if organism in table else pd.Series("", pairs.index)
            often = Counter(symbols)
            of_symbol = {name: i for i, name in enumerate(symbols) if name and often[name] == 1}
            sides.append(Side(organism, {name: i for i, name in enumerate(pairs[k])}, of_symbol))
        return cls(sides[0], sides[1], len(pairs), str(path))

    def organism_of(self, genes: Vocabulary | AnnData) -> str:
        """Return the organism whose genes most of those of a model or of cells are. Raises ScfmError for neither's."""
        names, _ = wanted(genes)
        found = {side.organism: matched(side.pairs_of(names)) for side in self.sides}
        if not any(found.values()):
            raise ScfmError(f"{self.file}: none of the genes is one of {' or '.join(found)}")
        return max(found, key=lambda organism: found[organism])

    def translate(self, adata: AnnData, to: Vocabulary | AnnData) -> AnnData:
        """Return the cells with the genes of the other organism, under the names that `to` has for them.

        Counts come from `raw.X` where there is one; obs stays. `.uns["orthologs"]` says what was kept and dropped.

        Args:
            adata: cells of one organism.
            to: the genes to find: those of a model, or of cells of the other organism.

        Raises:
            ScfmError: the cells are of the same organism already, or no gene has a partner there.
        """
        import anndata
        from scipy.sparse import csr_matrix

        held = adata if adata.raw is None else adata.raw
        own = genes_of(with_names_of(held.var, adata.var))
        theirs, names = wanted(to)
        target = max(self.sides, key=lambda side: matched(side.pairs_of(theirs)))
        source = self.sides[1 - self.sides.index(target)]
        pairs = source.pairs_of(own)
        if matched(target.pairs_of(own)) >= matched(pairs):
            raise ScfmError(
                f"{self.file}: the genes of the cells are not those of {source.organism}; where they are of "
                f"{target.organism} already, leave the orthologs out"
            )
        place: dict[int, int] = {}
        for i, pair in enumerate(target.pairs_of(theirs)):
            if pair >= 0:
                place.setdefault(pair, i)
        found = [(column, place[pair]) for column, pair in enumerate(pairs) if pair in place]
        if not found:
            raise ScfmError(f"{self.file}: no gene of the cells has an ortholog among the genes looked for")
        columns, places = (np.array(numbers) for numbers in zip(*found, strict=True))
        kept = np.unique(places)
        values = csr_matrix(held.X)
        put = csr_matrix(
            (np.ones(len(columns), values.dtype), (columns, np.searchsorted(kept, places))),
            (values.shape[1], len(kept)),
        )
        translated = values @ put
        total = float(values.sum())
        said: dict[str, Any] = {
            "file": self.file,
            "from": source.organism,
            "to": target.organism,
            "genes": len(pairs),
            "genes_with_ortholog": matched(pairs),
            "genes_kept": len(columns),
            "genes_summed": len(columns) - len(kept),
            "genes_dropped": len(pairs) - len(columns),
            "share_of_values_kept": float(translated.sum()) / total if total else 0.0,
        }
        ids, symbols = ([side[i] or "" for i in kept] for side in theirs)
        var = pd.DataFrame({"ensembl_id": ids, "symbol": symbols}, index=[names[i] for i in kept])
        return anndata.AnnData(translated.tocsr(), obs=adata.obs.copy(), var=var, uns={"orthologs": said})


def matched(pairs: Sequence[int]) -> int:
    """Return how many genes are in a pair."""
    return sum(pair >= 0 for pair in pairs)


def wanted(to: Vocabulary | AnnData) -> tuple[Names, list[str]]:
    """Return the Ensembl ids and symbols of the genes to find, and their names."""
    if isinstance(to, Vocabulary):
        entries = to.entries[: to.n_genes]
        return ([gene.ensembl for gene in entries], [gene.symbol for gene in entries]), [gene.id for gene in entries]
    return genes_of(to.var), [str(name) for name in to.var_names]


def read_table(path: Path) -> pd.DataFrame:
    """Return a table as strings, empty where nothing stands. Raises ScfmError where it cannot be read."""
    if not path.is_file():
        raise ScfmError(f"{path}: there is no such table of orthologs")
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            separator = "," if ".csv" in path.suffixes else "\t"
            table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    except (OSError, EOFError, ValueError) as error:
        raise ScfmError(f"{path}: cannot be read as a table of orthologs ({error})") from error
    return table.fillna("").astype(str)
