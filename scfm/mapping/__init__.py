"""Reference mapping: cells of a query take over the labels of their nearest neighbours in a reference."""

from __future__ import annotations

from scfm.mapping.index import ReferenceIndex

__all__ = ["ReferenceIndex"]
