"""An index of reference cells: built with a model, saved, extended, and asked for the labels of new cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from scfm.errors import ScfmError
from scfm.mapping.parts import Calibration, Content, Part, read_index, write_index
from scfm.mapping.search import nearest
from scfm.mapping.transfer import farthest_known, remoteness, votes

if TYPE_CHECKING:
    from anndata import AnnData

    from scfm.pretrained import PretrainedModel

K = 15
MAX_K = 50
KNOWN_SHARE = 0.95
CALIBRATION_CELLS = 2000


class ReferenceIndex:
    """Cell embeddings of a reference, with labels; vectors are float16, and those of a loaded index stay on the disk.

    Args:
        content: model, labels and cells.
        folder: where it was loaded from or saved to.
        digest: of the index.json there.
    """

    def __init__(self, content: Content, folder: Path | None = None, digest: str | None = None) -> None:
        self.content = content
        self.folder = folder
        self.digest = digest

    @classmethod
    def build(
        cls,
        model: PretrainedModel,
        adata: AnnData,
        labels: Sequence[str],
        *,
        batch: str | None = None,
        source: str = "AnnData",
        **embedding: Any,
    ) -> Self:
        """Return an index of labelled cells.

        Args:
            model: embeds the cells.
            adata: raw counts, as for `PretrainedModel.embed`; its obsm and uns receive what `embed` writes.
            labels: obs columns that queries take over.
            batch: obs column (donor, study ...): distances are calibrated between its values, as befits queries that
                come from a batch of their own. If not given, they are calibrated within the reference as a whole.
            source: what results call these cells, e.g. a file.
            **embedding: options of `PretrainedModel.embed`.

        Raises:
            ScfmError: a column is missing or has gaps, there are fewer than two cells (or batches), or as for `embed`.
        """
        if not labels:
            raise ScfmError("labels: name at least one obs column that queries shall take over")
        if batch in labels:
            raise ScfmError(f"batch: {batch!r} is a label, too; distances between its values would not be of its cells")
        identity = {"hash": model.embedding_hash(), "source": model.source, "width": model.files.model.width}
        index = cls(Content(identity, {name: [] for name in labels}, batch))
        return index.extend(model, adata, source=source, **embedding)

    @classmethod
    def from_vectors(
        cls,
        vectors: NDArray,
        labels: Mapping[str, Sequence[str]],
        *,
        cells: NDArray[np.uint64],
        model: Mapping[str, Any],
        batches: Sequence[str] | None = None,
    ) -> Self:
        """Return an index of vectors that are there already.

        Args:
            vectors: (n, D) unit vectors.
            labels: column -> (n,) names.
            cells: (n,) profile hashes.
            model: `hash`, `source` and `width` of the model that made them.
            batches: (n,) batch of each cell, for calibration between batches.

        Raises ScfmError for vectors that are no unit vectors, or too few cells.
        """
        index = cls(Content(dict(model), {name: [] for name in labels}, None if batches is None else "batch"))
        columns = dict(labels) if batches is None else {**labels, "batch": batches}
        index.append(vectors, columns, cells, "vectors")
        index.calibrate()
        return index

    @property
    def n_cells(self) -> int:
        """How many cells the index holds."""
        return sum(len(part) for part in self.content.parts)

    @property
    def labels(self) -> list[str]:
        """The obs columns that queries can take over."""
        return [name for name in self.content.categories if name != self.content.batch]

    def extend(self, model: PretrainedModel, adata: AnnData, *, source: str = "AnnData", **embedding: Any) -> Self:
        """Add labelled cells and calibrate anew; `save` writes them.

        Args:
            model: the one that the index was built with.
            adata: raw counts, with all label columns of the index (and its batch column).
            source: what results call these cells.
            **embedding: options of `PretrainedModel.embed`.

        Raises:
            ScfmError: another model, cells that the index holds already, all of them, or as for `build`.
        """
        from scfm.baselines.inputs import read_labels
        from scfm.data.hashing import store_hashes

        self.check_model(model)
        columns = [*self.labels, *([self.content.batch] if self.content.batch else [])]
        labels = {name: read_labels(adata, name) for name in columns}
        options = {name: embedding[name] for name in ("accept_normalised", "genes") if name in embedding}
        cells = store_hashes(model.store(adata, **options))
        if self.n_cells and self.held(cells).all():
            raise ScfmError(f"{source}: all {len(cells):,} cells are in the index already")
        vectors = model.embed(adata, **embedding).obsm["X_scfm"]
        self.append(vectors, labels, cells, source)
        self.calibrate()
        return self

    def append(
        self, vectors: NDArray, labels: Mapping[str, Sequence[str] | NDArray], cells: NDArray[np.uint64], source: str
    ) -> None:
        """Add unit vectors (n, D) with labels and profile hashes; `calibrate` must follow."""
        width = self.content.model["width"]
        if vectors.shape != (len(cells), width):
            raise ScfmError(f"{source}: vectors are {vectors.shape}, expected ({len(cells)}, {width}): cells, width")
        halves = vectors.astype(np.float16, copy=False)
        for first in range(0, len(halves), 10_000):
            lengths = np.linalg.norm(halves[first : first + 10_000].astype(np.float32), axis=1)
            if not np.all(np.abs(lengths - 1) < 0.01):  # float16 is off by 0.0005 at most
                raise ScfmError(f"{source}: vectors are not of length 1 (NaN, or not normalised); see `scfm embed`")
        codes = {}
        for name in labels:
            known = list(dict.fromkeys([*self.content.categories.get(name, []), *map(str, labels[name])]))
            self.content.categories[name] = known
            place = {one: at for at, one in enumerate(known)}
            codes[name] = np.array([place[str(one)] for one in labels[name]], np.int32)
        self.content.parts.append(Part(halves, codes, cells, source))

    def calibrate(self) -> None:
        """Find the neighbours of a sample of the reference among its other cells, or those of other batches.

        Raises ScfmError where no cell has a neighbour.
        """
        parts, n, batch = self.content.parts, self.n_cells, self.content.batch
        if n < 2:
            raise ScfmError(f"an index needs two cells at least, there is {n}")
        rows = np.sort(np.random.default_rng(0).choice(n, min(n, CALIBRATION_CELLS), replace=False))
        sampled = self.at([part.vectors for part in parts], rows)
        groups = np.arange(n) if batch is None else np.concatenate([part.labels[batch] for part in parts])
        distances, neighbours = nearest(
            sampled, [part.vectors for part in parts], min(MAX_K, n - 1), apart=(groups[rows], groups)
        )
        if not np.isfinite(distances[:, 0]).all():
            raise ScfmError(f"obs[{batch!r}]: has one value only, so distances cannot be calibrated between its values")
        self.content.calibration = Calibration(rows, distances, neighbours)

    def save(self, folder: str | Path) -> None:
        """Write the index; where it came from this folder, only what was added, committed by one rename.

        Raises ScfmError where the folder holds anything else, or the index there was changed meanwhile.
        """
        folder = Path(folder)
        if folder == self.folder:
            self.digest = write_index(folder, self.content, self.digest)
            return
        copies = [Part(part.vectors, part.labels, part.cells, part.source) for part in self.content.parts]
        self.digest = write_index(folder, Content(**{**vars(self.content), "parts": copies}), None)
        self.content.parts, self.folder = copies, folder

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Return the index of a folder, its vectors memory-mapped. Raises ScfmError where it is none, or damaged."""
        content, digest = read_index(Path(folder))
        return cls(content, Path(folder), digest)

    def query(
        self,
        model: PretrainedModel,
        adata: AnnData,
        *,
        labels: Sequence[str] = (),
        k: int = K,
        known_share: float = KNOWN_SHARE,
        **embedding: Any,
    ) -> AnnData:
        """Write labels taken over from the reference into `adata`, and return it.

        For a label `cell_type`: `.obs["mapped_cell_type"]`, `.obs["mapped_cell_type_confidence"]` (the label's share of
        its neighbours' weight) and all shares in `.obsm["mapped_cell_type_probabilities"]`, columns as in
        `.uns["mapping"]["labels"]["cell_type"]`. `.obs["mapping_distance"]` is the mean distance to the k neighbours;
        where it is larger than what `known_share` of the reference's own cells of that label stay within
        (`.uns["mapping"]["farthest_known"]["cell_type"]`, in the order of the labels), it is `Unassigned`, whatever the
        confidence.
        `.obsm["mapping_distances"]` and `.obsm["mapping_neighbours"]` (n, k): how far each neighbour, which row of the
        index.

        Args:
            model: the one that the index was built with.
            adata: raw counts, as for `PretrainedModel.embed`, whose embedding is written, too.
            labels: columns to take over; all of the index if not given.
            k: neighbours that vote.
            known_share: share of cells like the reference's own that shall get a label.
            **embedding: options of `PretrainedModel.embed`.

        Raises:
            ScfmError: another model, an unknown label, k or a share out of range, or as for `embed`.
        """
        import pandas as pd

        from scfm.data.hashing import store_hashes
        from scfm.pretrained import UNASSIGNED

        self.check_model(model)
        asked = list(labels) or self.labels
        self.check_labels(asked)
        limits = {name: self.farthest_known(name, k, known_share) for name in asked}
        model.embed(adata, **embedding)
        distances, rows = self.neighbours(adata.obsm["X_scfm"], k)
        remote = remoteness(distances, k)
        unassigned = {}
        for name in asked:
            shares = self.vote(name, distances, rows)
            names = self.content.categories[name]
            best = np.array(names, dtype=object)[shares.argmax(axis=1)]
            beyond = remote > limits[name][shares.argmax(axis=1)]
            best[beyond] = UNASSIGNED
            unassigned[name] = int(beyond.sum())
            adata.obs[f"mapped_{name}"] = pd.Categorical(best, categories=list(dict.fromkeys([*names, UNASSIGNED])))
            adata.obs[f"mapped_{name}_confidence"] = shares.max(axis=1).astype(np.float32)
            adata.obsm[f"mapped_{name}_probabilities"] = shares.astype(np.float32)
        adata.obs["mapping_distance"] = remote
        adata.obsm["mapping_distances"], adata.obsm["mapping_neighbours"] = distances, rows
        options = {name: embedding[name] for name in ("accept_normalised", "genes") if name in embedding}
        adata.uns["mapping"] = {
            "reference": [part.source for part in self.content.parts],
            "reference_cells": self.n_cells,
            "labels": {name: list(self.content.categories[name]) for name in asked},
            "k": k,
            "known_share": known_share,
            "farthest_known": limits,
            "unassigned": unassigned,
            "cells_in_reference": int(self.held(store_hashes(model.store(adata, **options))).sum()),
            "leave_one_out_accuracy": {name: self.leave_one_out(name, k) for name in asked},
        }
        return adata

    def neighbours(self, vectors: NDArray, k: int = K) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return distances (n, k), ascending, and rows of the index (n, k) of the nearest cells of vectors (n, D)."""
        if vectors.shape[1] != self.content.model["width"]:
            raise ScfmError(f"vectors are of width {vectors.shape[1]}, the index of {self.content.model['width']}")
        return nearest(vectors.astype(np.float16), [part.vectors for part in self.content.parts], k)

    def vote(self, label: str, distances: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return each label's share of the neighbours' weight, (n, C), columns as in `content.categories`."""
        codes = self.at([part.labels[label] for part in self.content.parts], np.maximum(rows, 0))
        codes = np.where(rows >= 0, codes, -1)
        return votes(distances, codes, len(self.content.categories[label]))

    def farthest_known(self, label: str, k: int = K, known_share: float = KNOWN_SHARE) -> NDArray[np.float64]:
        """Return, per name of a label (C,), the mean distance to k neighbours that a share of its cells stays within.

        Raises ScfmError where k or the share is out of range.
        """
        sample = self.content.calibration
        assert sample is not None
        most = int(np.isfinite(sample.distances).all(axis=0).sum())
        if not 1 <= k <= most:
            raise ScfmError(f"k: {k} neighbours; this index is calibrated for 1 to {most}")
        if not 0 < known_share <= 1:
            raise ScfmError(f"known_share: {known_share} is not a share; give a number above 0, up to 1")
        own = self.at([part.labels[label] for part in self.content.parts], sample.rows)
        return farthest_known(remoteness(sample.distances, k), own, len(self.content.categories[label]), known_share)

    def leave_one_out(self, label: str, k: int = K) -> float:
        """Return how often the sampled cells of the reference get their own label from the others."""
        sample = self.content.calibration
        assert sample is not None
        shares = self.vote(label, sample.distances[:, :k], sample.neighbours[:, :k])
        own = self.at([part.labels[label] for part in self.content.parts], sample.rows)
        return float((shares.argmax(axis=1) == own).mean())

    def held(self, cells: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Say for each profile hash (n,) whether the index holds such a cell."""
        found = np.zeros(len(cells), bool)
        for part in self.content.parts:
            found |= np.isin(cells, part.cells)
        return found

    def at(self, arrays: list[Any], rows: NDArray[np.int64]) -> NDArray:
        """Return the entries at some rows (any shape), of an array per part."""
        starts = np.cumsum([0, *(len(array) for array in arrays)])
        taken = np.empty((*rows.shape, *arrays[0].shape[1:]), arrays[0].dtype)
        for start, array in zip(starts, arrays, strict=False):
            here = (rows >= start) & (rows < start + len(array))
            taken[here] = array[rows[here] - start]
        return taken

    def check_model(self, model: PretrainedModel) -> None:
        """Raise ScfmError where another model than this made the vectors."""
        made = self.content.model
        if model.embedding_hash() != made["hash"]:
            raise ScfmError(
                f"{model.source}: is not the model that the index was built with ({made['source']}): weights, "
                "vocabulary or tokenisation differ, so distances between their embeddings mean nothing; build another"
            )

    def check_labels(self, asked: Sequence[str]) -> None:
        """Raise ScfmError for a label that the index does not have."""
        if unknown := [name for name in asked if name not in self.labels]:
            raise ScfmError(f"label {unknown[0]!r}: is not in the index; it has {', '.join(self.labels)}")
