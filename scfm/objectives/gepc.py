"""GEPC: predict the values of unknown genes from the cell embedding."""

from __future__ import annotations

from scfm.objectives.gep import GEP


class GEPC(GEP):
    """Gene expression prediction for cell modelling (scGPT; MVC in its code): as GEP, from the cell embedding alone."""

    name = "gepc"
    head = "gepc"
