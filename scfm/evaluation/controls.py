"""Methods that must lose and methods that know the answer: what a metric says of them bounds what it can say at all."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scfm.baselines.inputs import read_labels
from scfm.errors import ScfmError
from scfm.model.novelty import UNASSIGNED

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

NEIGHBOURS = 10
NOISE_WIDTH = 32


def noise(adata: AnnData, seed: int) -> NDArray[np.float32]:
    """Return an embedding (n, 32) that knows nothing: independent standard normal numbers."""
    # other cells, other noise: else the i-th held-out cell would lie where the i-th training cell does
    names = zlib.crc32("\n".join(adata.obs_names).encode())
    return np.random.default_rng([seed, names]).standard_normal((adata.n_obs, NOISE_WIDTH)).astype(np.float32)


def random_weights(model: Path) -> Callable[[AnnData, int], NDArray]:
    """Return what embeds cells with the network of a model directory, weights drawn anew by the seed, never trained."""

    def embed(adata: AnnData, seed: int) -> NDArray:
        import torch

        from scfm.checkpoints.native import read_model
        from scfm.pretrained import EMBEDDING, PretrainedModel

        files = read_model(model)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = files.build()
        return PretrainedModel(network, files, f"{model}, random weights").embed(adata.copy()).obsm[EMBEDDING]

    return embed


class NearestIn:
    """Labels of the nearest training cells in an embedding that was never fitted to anything.

    Args:
        name, description: for the report.
        embed: cells -> (n, d), the same for the same cells whatever they come with, given a seed.
    """

    def __init__(self, name: str, description: str, embed: Callable[[AnnData, int], NDArray]) -> None:
        self.name, self.description, self.of = name, description, embed
        self.classes: list[str] = []

    def describe(self) -> str:
        return f"{self.description}; {NEIGHBOURS} nearest training cells, equal votes"

    def fit(self, adata: AnnData, label: str, seed: int) -> NearestIn:
        from sklearn.neighbors import KNeighborsClassifier

        self.seed = seed
        labels = read_labels(adata, label)
        self.knn = KNeighborsClassifier(min(NEIGHBOURS, len(labels))).fit(self.of(adata, seed), labels)
        self.classes = self.knn.classes_.tolist()
        return self

    def embed(self, adata: AnnData) -> NDArray:
        return self.of(adata, self.seed)

    def predict(self, adata: AnnData) -> tuple[NDArray, NDArray]:
        votes = self.knn.predict_proba(self.of(adata, self.seed))
        return np.array(self.classes)[votes.argmax(1)], votes


class ShuffledLabels:
    """Logistic regression on training labels that were dealt out at random.

    What it scores above chance does not come from what a method learned of the types.
    """

    name = "shuffled labels"

    def describe(self) -> str:
        return "balanced logistic regression, fitted to the training labels in random order"

    def fit(self, adata: AnnData, label: str, seed: int) -> ShuffledLabels:
        from scfm.baselines import BalancedLogisticRegression

        shuffled = adata.copy()
        shuffled.obs[label] = np.random.default_rng(seed).permutation(read_labels(adata, label))
        self.model = BalancedLogisticRegression().fit(shuffled, label, seed)
        self.classes = self.model.classes
        return self

    def predict(self, adata: AnnData) -> tuple[NDArray, NDArray]:
        return self.model.predict(adata)


class Oracle:
    """Knows the label of every cell, but can only say those that it met in training.

    Args:
        known: cell name -> label.
    """

    name = "true labels"

    def __init__(self, known: dict[str, str]) -> None:
        self.known = known

    def describe(self) -> str:
        return "the true label where a training cell has it: what is lost is lost to types without a training cell"

    def fit(self, adata: AnnData, label: str, seed: int) -> Oracle:
        self.classes = np.unique(read_labels(adata, label)).tolist()
        return self

    def predict(self, adata: AnnData) -> tuple[NDArray, NDArray]:
        labels = [self.known[name] for name in adata.obs_names]
        probabilities = np.array([[float(name == one) for one in self.classes] for name in labels])
        # a cell of no training type gets the first one, as wrong as any other; or is known to be novel
        found = np.array(self.classes)[probabilities.argmax(1)]
        return np.where(np.array(labels) == UNASSIGNED, UNASSIGNED, found), probabilities


class SplitHalf:
    """Logistic regression on one half of the held-out cells themselves predicts the other half, and the reverse.

    It has what no method has, labels of the very set it is judged on: a ceiling for what the data allow a linear
    classifier, without any difference between training and held-out cells.

    Args:
        known: cell name -> label.
    """

    name = "split half"

    def __init__(self, known: dict[str, str]) -> None:
        self.known = known

    def describe(self) -> str:
        return (
            "balanced logistic regression on labels of half of the held-out cells, predicting the other half, and the "
            "reverse: the ceiling where training cells differ from held-out ones; low where held-out cells are few"
        )

    def fit(self, adata: AnnData, label: str, seed: int) -> SplitHalf:
        self.label, self.seed = label, seed
        return self

    def predict(self, adata: AnnData) -> tuple[NDArray, NDArray]:
        from scfm.baselines import BalancedLogisticRegression

        truth = np.array([self.known[name] for name in adata.obs_names])
        half = np.zeros(len(truth), bool)
        rng = np.random.default_rng(self.seed)
        for k, name in enumerate(np.unique(truth)):
            rows = rng.permutation(np.flatnonzero(truth == name))
            half[rows[k % 2 :: 2]] = True
        self.classes = np.unique(truth).tolist()
        predicted = np.empty(len(truth), dtype=object)
        probabilities = np.zeros((len(truth), len(self.classes)))
        for side in (half, ~half):
            known = adata[side].copy()
            known.obs[self.label] = truth[side]
            if len(set(truth[side])) < 2:
                raise ScfmError("half of the held-out cells are all of one type, so there is no ceiling to measure")
            model = BalancedLogisticRegression().fit(known, self.label, self.seed)
            labels, found = model.predict(adata[~side].copy())
            predicted[~side] = labels
            columns = [self.classes.index(name) for name in model.classes]
            probabilities[np.ix_(~side, columns)] = found
        return predicted.astype(str), probabilities


class NoiseEmbedding:
    """Independent random numbers in place of an embedding: batches are mixed perfectly, and so are types."""

    name = "noise embedding"

    def describe(self) -> str:
        return f"{NOISE_WIDTH} independent standard normal numbers for each cell"

    def fit_embed(self, adata: AnnData, batch: str | None, seed: int) -> NDArray[np.float32]:
        return noise(adata, seed)


class ShuffledCells:
    """A real embedding whose cells changed places: its shape says nothing of the cells."""

    name = "shuffled cells"

    def describe(self) -> str:
        return "HVG + PCA, its rows dealt to the cells at random"

    def fit_embed(self, adata: AnnData, batch: str | None, seed: int) -> NDArray[np.float32]:
        from scfm.baselines import HVGPCA

        return np.random.default_rng(seed).permutation(HVGPCA().fit_embed(adata, batch, seed))


class TrueLabels:
    """Every type at a corner of its own, cells of all batches around it: what integration can reach at best.

    Args:
        labels: (n,) types of the cells.
    """

    name = "true labels"
    spread = 0.05  # of a corner's distance to the origin, so that cells of a type are not all the same point

    def __init__(self, labels: NDArray[np.str_]) -> None:
        self.labels = labels

    def describe(self) -> str:
        return "each type at a corner of its own, with a little noise around it"

    def fit_embed(self, adata: AnnData, batch: str | None, seed: int) -> NDArray[np.float32]:
        _, code = np.unique(self.labels, return_inverse=True)
        corners = np.eye(code.max() + 1, dtype=np.float32)[code]
        return corners + self.spread * np.random.default_rng(seed).standard_normal(corners.shape).astype(np.float32)


class SplitHalfEmbedding:
    """Batches that differ no more than random parts of one batch do, types as far apart as they are in the expression.

    The ceiling that the data set: where types overlap in the principal components of a single batch, no mixing of
    batches can tell them apart.

    Args:
        labels: (n,) types of the cells.
    """

    name = "split half"

    def __init__(self, labels: NDArray[np.str_]) -> None:
        self.labels = labels

    def describe(self) -> str:
        return (
            "HVG + PCA; by the true labels the batches of each type are moved onto one another, and its cells change "
            "places at random, so that batches differ as random parts of one do: the ceiling where types overlap"
        )

    def fit_embed(self, adata: AnnData, batch: str | None, seed: int) -> NDArray[np.float32]:
        from scfm.baselines import HVGPCA

        assert batch is not None  # integration names one
        embedding, batches = HVGPCA().fit_embed(adata, batch, seed), read_labels(adata, batch)
        rng = np.random.default_rng(seed)
        for label in np.unique(self.labels):
            of_type = np.flatnonzero(self.labels == label)
            middle = embedding[of_type].mean(0)
            for name in np.unique(batches[of_type]):
                mine = of_type[batches[of_type] == name]
                embedding[mine] += middle - embedding[mine].mean(0)
            embedding[of_type] = embedding[rng.permutation(of_type)]
        return embedding


class Untrained:
    """The cell embedding of a model's network whose weights are random.

    Args:
        model: model directory, of which nothing but the form is taken.
        name: what the report calls it.
    """

    def __init__(self, model: Path, name: str) -> None:
        self.name, self.embed = name, random_weights(model)

    def describe(self) -> str:
        return "cell embedding of the same network with random weights, never trained"

    def fit_embed(self, adata: AnnData, batch: str | None, seed: int) -> NDArray[np.float32]:
        return self.embed(adata, seed)
