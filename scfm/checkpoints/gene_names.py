"""Names of genes, as the files of other programs have them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from scfm.data.vocabulary import Vocabulary


def with_ensembl(vocabulary: Vocabulary, ensembl_of: Mapping[str, str]) -> Vocabulary:
    """Add the Ensembl ids of genes known by symbol only, where no two genes would share one."""
    found = {gene.id: ensembl_of[gene.id] for gene in vocabulary.entries if not gene.ensembl and gene.id in ensembl_of}
    owners = Counter(found.values()) + Counter(gene.ensembl for gene in vocabulary.entries if gene.ensembl)
    unique = {symbol: ensembl for symbol, ensembl in found.items() if owners[ensembl] == 1}
    return Vocabulary([replace(gene, ensembl=unique.get(gene.id, gene.ensembl)) for gene in vocabulary.entries])


def names_of(vocabulary: Vocabulary) -> list[str]:
    """Return the name of each entry for others: its symbol where that is nobody else's name, else its id."""
    ids = {gene.id for gene in vocabulary.entries}
    symbols = Counter(gene.symbol for gene in vocabulary.entries)
    return [
        gene.symbol
        if gene.symbol and symbols[gene.symbol] == 1 and (gene.symbol == gene.id or gene.symbol not in ids)
        else gene.id
        for gene in vocabulary.entries
    ]
