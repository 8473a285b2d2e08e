"""Cells of two organisms in the genes of one, so that a model of that one and every baseline see the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from scfm.errors import ScfmError

if TYPE_CHECKING:
    from anndata import AnnData

    from scfm.data.orthologs import Orthologs
    from scfm.data.vocabulary import Vocabulary


def in_one_organism(sets: Sequence[AnnData], orthologs: Orthologs, vocabulary: Vocabulary) -> tuple[list[AnnData], str]:
    """Return sets of cells in the genes of the model's organism, and what was done, in words.

    Cells of the other organism get the gene names of the first set that is of the model's own.

    Raises ScfmError where no set, or every set, is of the model's organism.
    """
    of_model = orthologs.organism_of(vocabulary)
    organisms = [orthologs.organism_of(cells) for cells in sets]
    if of_model not in organisms:
        raise ScfmError(f"--orthologs: the model is of {of_model}, all cells are of {organisms[0]}; add cells of both")
    if set(organisms) == {of_model}:
        raise ScfmError(f"--orthologs: all cells are of {of_model}, as the model is; leave the table out")
    own = sets[organisms.index(of_model)]
    found, said = [], []
    for cells, organism in zip(sets, organisms, strict=True):
        if organism == of_model:
            found.append(cells)
            continue
        translated = orthologs.translate(cells, own)
        counted = translated.uns.pop("orthologs")
        found.append(translated)
        said.append(
            f"{organism} cells in {of_model} genes, {counted['genes_kept']:,} of {counted['genes']:,} by one-to-one "
            f"orthologs, with {counted['share_of_values_kept']:.0%} of the counts"
        )
    return found, "across species: " + "; ".join(said)
