"""Reference mapping: `scfm index`, `scfm map`, and the same as a method for the harness; nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scfm.data.gene_table import GeneTable
from scfm.errors import ScfmError
from scfm.mapping.index import KNOWN_SHARE, K, ReferenceIndex

if TYPE_CHECKING:
    from anndata import AnnData

    from scfm.pretrained import PretrainedModel


def index(
    files: Sequence[str],
    *,
    model: str,
    label: Sequence[str] = (),
    batch: str | None = None,
    out: str | None = None,
    extend: str | None = None,
    tokens_per_pack: int = 16384,
    accept_normalised: bool = False,
    genes: Sequence[str] = (),
) -> None:
    """Embed labelled cells, file by file, into a reference index.

    Args:
        files: h5ad files with raw counts and labels.
        model: Model directory.
        label: obs columns that queries shall take over; an index that is extended has its own.
        batch: obs column (donor, study ...) between whose values distances are calibrated, as for queries of their own.
        out: Folder for a new index; must not exist or be empty.
        extend: Folder of an index, built with the same model, to which the cells are added; not with --out.
        tokens_per_pack: Most tokens in one forward pass; lower it where memory is short.
        accept_normalised: Take values that are not counts; bins keep only their order within a cell.
        genes: Tables of genes (HGNC, GENCODE ...), the most trusted first, by which more names are matched.
    """
    from scfm.inference import read_anndata
    from scfm.pretrained import load

    if (out is None) == (extend is None):
        raise ScfmError("scfm index: give --out for a new index, or --extend for one that is there")
    if extend is not None and (label or batch):
        raise ScfmError("--extend: the index has its labels and batch column already; leave out --label and --batch")
    folder = Path(str(out or extend))
    if out is not None and folder.exists() and any(folder.iterdir()):
        raise ScfmError(f"{folder}: is not empty; choose another --out")
    loaded = load(model)
    options: dict[str, Any] = {"tokens_per_pack": tokens_per_pack, "accept_normalised": accept_normalised}
    options["genes"] = GeneTable.read(genes) if genes else None
    found = None if extend is None else ReferenceIndex.load(folder)
    for file in files:
        adata = read_anndata(Path(file))
        if found is None:
            found = ReferenceIndex.build(loaded, adata, label, batch=batch, source=file, **options)
        else:
            found.extend(loaded, adata, source=file, **options)
    assert found is not None
    found.save(folder)
    print(f"{found.n_cells:,} cells: {folder}")
    for name in found.labels:
        print(
            f"{name}: {len(found.content.categories[name])} names; {found.leave_one_out(name):.3f} of the cells are "
            f"given their own by their {K} neighbours{f' in other values of {batch}' if batch else ''}"
        )


def map_cells(
    file: str,
    *,
    reference: str,
    model: str,
    out: str,
    label: Sequence[str] = (),
    k: int = K,
    known_share: float = KNOWN_SHARE,
    tokens_per_pack: int = 16384,
    accept_normalised: bool = False,
    genes: Sequence[str] = (),
) -> None:
    """Write the labels of the nearest reference cells into `.obs`, with confidence and distance.

    Args:
        file: h5ad file with raw counts.
        reference: Folder of a reference index, or an h5ad file with raw counts and labels.
        model: Model directory; the one that the index was built with.
        out: h5ad file to write; must not exist.
        label: obs columns of the reference to take over; all those of an index if not given.
        k: Neighbours that vote.
        known_share: Share of cells like the reference's own that shall get a label; farther ones are `Unassigned`.
        tokens_per_pack: Most tokens in one forward pass; lower it where memory is short.
        accept_normalised: Take values that are not counts; bins keep only their order within a cell.
        genes: Tables of genes (HGNC, GENCODE ...), the most trusted first, by which more names are matched.
    """
    from scfm.inference import over_file, read_anndata

    place = Path(reference)
    if not place.is_dir() and not label:
        raise ScfmError("--label: name the obs columns of the reference that the cells shall take over")
    options: dict[str, Any] = {"tokens_per_pack": tokens_per_pack, "accept_normalised": accept_normalised}
    options["genes"] = GeneTable.read(genes) if genes else None

    def work(loaded: PretrainedModel, adata: AnnData) -> AnnData:
        if place.is_dir():
            found = ReferenceIndex.load(place)
        else:
            found = ReferenceIndex.build(loaded, read_anndata(place), label, source=reference, **options)
        return found.query(loaded, adata, labels=label, k=k, known_share=known_share, **options)

    said = over_file(file, model, out, work).uns["mapping"]
    for name, n in said["unassigned"].items():
        print(f"{name}: {n:,} cells unassigned, farther from the reference than {known_share:.0%} of its own cells")
    if said["cells_in_reference"]:
        print(f"note: {said['cells_in_reference']:,} of the cells are in the reference themselves")


class ReferenceMapping:
    """Reference mapping as a method to be judged: the training cells are the reference, nothing is trained.

    Args:
        name: what the report calls it.
        model: embeds the cells.
        k: neighbours that vote.
        known_share: cells farther than this share of the reference's own of their label are `Unassigned`; None: none.
    """

    def __init__(self, name: str, model: PretrainedModel, k: int = K, known_share: float | None = None) -> None:
        self.name = name
        self.model = model
        self.k = k
        self.known_share = known_share
        self.classes: list[str] = []
        self.novelty: NDArray[np.float64] | None = None

    @property
    def training_hashes(self) -> NDArray[np.uint64] | None:
        """Hashes of the cells that the model was trained on, None where they are not known."""
        return self.model.files.cell_hashes

    def describe(self) -> str:
        """Return what the method does, in one sentence for the report."""
        without = "" if self.known_share is None else f"; unassigned beyond {self.known_share:.0%} of the reference"
        return f"pretrained embedding, nothing trained; {self.k} nearest training cells, weighed by distance{without}"

    def fit(self, adata: AnnData, label: str, seed: int) -> ReferenceMapping:
        """Index the training cells."""
        self.label = label
        self.index = ReferenceIndex.build(self.model, adata.copy(), [label])
        self.classes = self.index.content.categories[label]
        return self

    def predict(self, adata: AnnData) -> tuple[NDArray, NDArray]:
        """Return labels (n,) and the neighbours' shares of the vote (n, C)."""
        from scfm.pretrained import UNASSIGNED

        distances, rows = self.index.neighbours(self.embed(adata), self.k)
        shares = self.index.vote(self.label, distances, rows)
        labels = np.array(self.classes, dtype=object)[shares.argmax(axis=1)]
        if self.known_share is not None:
            limits = self.index.farthest_known(self.label, self.k, self.known_share)
            self.novelty = distances.mean(axis=1) / limits[shares.argmax(axis=1)]
            labels[self.novelty > 1] = UNASSIGNED
        return labels.astype(str), shares

    def embed(self, adata: AnnData) -> NDArray:
        """Return the embedding of each cell, (n, D)."""
        return self.model.embed(adata.copy()).obsm["X_scfm"]
