"""Organisms by any of their names: NCBI's taxon id, as obs and uns of CELLxGENE have it, or the Latin name."""

from __future__ import annotations

TAXA = {
    "NCBITaxon:9606": "Homo sapiens",
    "NCBITaxon:10090": "Mus musculus",
    "NCBITaxon:9544": "Macaca mulatta",
    "NCBITaxon:9541": "Macaca fascicularis",
    "NCBITaxon:9598": "Pan troglodytes",
    "NCBITaxon:9483": "Callithrix jacchus",
    "NCBITaxon:10116": "Rattus norvegicus",
    "NCBITaxon:7955": "Danio rerio",
    "NCBITaxon:7227": "Drosophila melanogaster",
    "NCBITaxon:6239": "Caenorhabditis elegans",
}
SPIKE_INS, SARS_COV_2 = "NCBITaxon:32630", "NCBITaxon:2697049"
NO_ORGANISMS = frozenset({SPIKE_INS, SARS_COV_2})
"""What the CELLxGENE schema allows as `feature_reference` beside the organism itself."""


def canonical_organism(name: str) -> str:
    """Return the taxon id of an organism that is known by another name, else the name in one spelling.

    "Homo sapiens", "homo_sapiens" and "NCBITaxon:9606" are the same.
    """
    plain = name.strip().replace("_", " ").lower()
    if plain.startswith("ncbitaxon:"):
        return "NCBITaxon:" + plain.removeprefix("ncbitaxon:")
    return next((taxon for taxon, latin in TAXA.items() if latin.lower() == plain), plain)


def spoken(organism: str) -> str:
    """Return an organism as messages call it: "Homo sapiens (NCBITaxon:9606)"."""
    return f"{TAXA[organism]} ({organism})" if organism in TAXA else organism
