"""What CELLxGENE's data ask of those who read them: assays whose counts depend on the length of genes."""

from __future__ import annotations

import numpy as np

from scfm.data.store import ObsColumn

FULL_LENGTH_ASSAYS = {
    "EFO:0003755": "FL-cDNA",
    "EFO:0008441": "full length single cell RNA sequencing",
    "EFO:0008747": "FRISCR",
    "EFO:0008763": "Hi-SCL",
    "EFO:0008797": "MATQ-seq",
    "EFO:0008877": "Quartz-seq",
    "EFO:0008930": "Smart-seq",
    "EFO:0008931": "Smart-seq2",
    "EFO:0008956": "SUPeR-seq",
    "EFO:0009810": "full length single nucleus RNA sequencing",
    "EFO:0009999": "G&T-seq",
    "EFO:0010004": "SCRB-seq",
    "EFO:0010006": "scM&T-seq",
    "EFO:0010022": "Smart-3Seq",
    "EFO:0010058": "Fluidigm C1",
    "EFO:0010184": "Smart-like",
    "EFO:0022396": "TruSeq",
    "EFO:0022488": "Smart-seq3",
    "EFO:0022839": "STORM-seq",
    "EFO:0030031": "SCOPE-chip",
    "EFO:0030060": "mCT-seq",
    "EFO:0030061": "mcSCRB-seq",
    "EFO:0700016": "Smart-seq v4",
}
"""The assays whose counts the Census divides by gene length before it normalises them, in any of its releases."""


def full_length_assays(column: ObsColumn | None) -> dict[str, int]:
    """Return how many cells are of each full-length assay, as "EFO:0008931 (Smart-seq2)", given their terms.

    There, longer genes count more.
    """
    if column is None:
        return {}
    codes = np.asarray(column.codes)
    cells = np.bincount(codes[codes >= 0], minlength=len(column.categories))
    return {
        f"{term} ({FULL_LENGTH_ASSAYS[term]})": int(n)
        for term, n in zip(column.categories, cells, strict=True)
        if term in FULL_LENGTH_ASSAYS
    }
