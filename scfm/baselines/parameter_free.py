"""The parameter-free pipelines of Souza and Mehta (arXiv 2602.16696): no network, no pretraining, nothing to tune."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from scfm.baselines.inputs import ExpressionRule, read_labels
from scfm.baselines.principal_components import WhitenedComponents
from scfm.baselines.rank_scores import ShiftedRows, rank_scores
from scfm.errors import ScfmError

if TYPE_CHECKING:
    import anndata

Kind = Literal["centroid", "pca_lr"]
Input = Literal["rank", "log1p"]
INPUTS = {"rank": "normal scores of the ranks of all genes in a cell", "log1p": "log expression"}


class ParameterFree:
    """Label cells by projection onto type profiles, or by ANOVA, whitened PCA and logistic regression.

    `centroid`: the profile of a type is the transform of the mean composition of its training cells; a cell's
    coordinates are its least-squares weights on the profiles, and its label is the largest one.
    `pca_lr`: the `n_features` genes of largest F statistic between types, each to mean 0 and variance 1, `n_pcs`
    principal components scaled to variance 1, balanced logistic regression. Genes, scaling and components come from
    the training cells only. Written from the formulas; equal to the original's outputs in tests/golden.

    Args:
        kind: `centroid` or `pca_lr`.
        input: `rank` (normal scores of within-cell ranks, which need nothing from other cells) or `log1p`.
        n_features: Genes kept by ANOVA; all where there are fewer. For `pca_lr`.
        n_pcs: Principal components; capped by cells and genes. For `pca_lr`.
    """

    def __init__(
        self, kind: Kind = "pca_lr", input: Input = "rank", n_features: int = 20_000, n_pcs: int = 220
    ) -> None:
        if kind not in ("centroid", "pca_lr") or input not in INPUTS:
            raise ScfmError(f"no parameter-free {kind!r} on {input!r}; kind is centroid or pca_lr, input rank or log1p")
        self.kind = kind
        self.input = input
        self.n_features = n_features
        self.n_pcs = n_pcs
        self.name = "parameter-free " + ("centroid" if kind == "centroid" else "PCA + LR")
        if input == "log1p":
            self.name += ", log1p"

    def describe(self) -> str:
        if self.kind == "centroid":
            return (
                f"{INPUTS[self.input]}; least-squares weights on the profile of each type, the largest wins; "
                "the positive weights as shares stand for probabilities"
            )
        return (
            f"{INPUTS[self.input]}; {self.n_features} genes by ANOVA, unit variance, {self.n_pcs} whitened principal "
            "components of the training cells; logistic regression, balanced classes"
        )

    def fit(self, adata: anndata.AnnData, label: str, seed: int = 0) -> ParameterFree:
        """Fit on the training cells. Raises ScfmError for unusable values, or labels that are all alike."""
        labels = read_labels(adata, label)
        if len(set(labels)) < 2:
            raise ScfmError(f"all {len(labels)} training cells have the same value of obs[{label!r}]: nothing to learn")
        self.rule = ExpressionRule.learn(adata)
        expression = self.rule.apply(adata)
        if self.kind == "centroid":
            self._fit_profiles(expression, labels)
        else:
            self._fit_components(self._transform(expression), labels, seed)
        return self

    def predict(self, adata: anndata.AnnData) -> tuple[NDArray[np.str_], NDArray[np.floating]]:
        """Return labels (n,) and probabilities (n, C), columns as in `classes`."""
        if self.kind == "centroid":
            weights = self.project(adata)
            return np.array(self.classes)[weights.argmax(1)], _shares(weights)
        cells = self._transform(self.rule.apply(adata)).columns(self.genes)
        probabilities = self.model.predict_proba(self.components.transform(cells))
        return np.array(self.classes)[probabilities.argmax(1)], probabilities

    def project(self, adata: anndata.AnnData) -> NDArray[np.floating]:
        """Return the least-squares weights of each cell on the profiles, (n, C). For `centroid`.

        A cell whose largest weight is below 0.1 resembles none of the types (the original calls it unspecified).
        """
        cells = self._transform(self.rule.apply(adata))
        lengths = cells.lengths()
        return cells.times(self.inverse.T) / np.where(lengths > 0, lengths, 1)[:, None]

    def _transform(self, expression: csr_matrix) -> ShiftedRows:
        if self.input == "rank":
            return rank_scores(expression)
        return ShiftedRows(expression, np.zeros(expression.shape[0]))

    def _fit_profiles(self, expression: csr_matrix, labels: NDArray[np.str_]) -> None:
        composition = expression.copy()
        np.expm1(composition.data, out=composition.data)
        if self.input == "rank":
            totals = np.asarray(composition.sum(axis=1)).ravel()
            composition.data /= np.repeat(totals, np.diff(composition.indptr))
        self.classes: list[str] = np.unique(labels).tolist()
        means = np.stack([np.asarray(composition[labels == name].mean(axis=0)).ravel() for name in self.classes])
        if self.input == "rank":
            profiles = rank_scores(csr_matrix(means)).dense()
        else:
            profiles = np.log1p(means)
            profiles /= np.linalg.norm(profiles, axis=1, keepdims=True)
        self.profiles = profiles  # (C, G)
        self.inverse = np.linalg.pinv(profiles.T)  # (C, G)

    def _fit_components(self, cells: ShiftedRows, labels: NDArray[np.str_], seed: int) -> None:
        from sklearn.linear_model import LogisticRegression

        scores = anova_f(cells, labels)
        # a gene that never varies has no F statistic and comes last; of equals, the later gene, as scikit-learn does
        order = np.argsort(np.nan_to_num(scores, nan=-1.0), kind="stable")
        self.genes = np.sort(order[-self.n_features :])
        chosen = cells.columns(self.genes)
        self.components = WhitenedComponents.fit(chosen, self.n_pcs, seed)
        self.model = LogisticRegression(class_weight="balanced", max_iter=1000)
        self.model.fit(self.components.transform(chosen), labels)
        self.classes = self.model.classes_.tolist()


class ParameterFreeCentroid(ParameterFree):
    """`ParameterFree(kind="centroid")` on ranks, as the obligatory baselines list it."""

    name = "parameter-free centroid"

    def __init__(self) -> None:
        super().__init__("centroid")


class ParameterFreePCA(ParameterFree):
    """`ParameterFree(kind="pca_lr")` on ranks, as the obligatory baselines list it."""

    name = "parameter-free PCA + LR"

    def __init__(self) -> None:
        super().__init__("pca_lr")


def anova_f(cells: ShiftedRows, labels: NDArray[np.str_]) -> NDArray[np.floating]:
    """Return the one-way F statistic of each gene between labels, (G,); NaN for a gene that never varies."""
    groups, members = np.unique(labels, return_inverse=True)
    n, classes = len(labels), len(groups)
    indicator = np.zeros((n, classes))
    indicator[np.arange(n), members] = 1
    centred = ShiftedRows(cells.sparse, cells.shift - cells.shift.mean())  # F ignores a constant; rounding does not
    sums = centred.transposed_times(indicator)  # (G, C)
    correction = sums.sum(axis=1) ** 2 / n
    between = (sums**2 / indicator.sum(axis=0)).sum(axis=1) - correction
    total = centred.column_squares() - correction
    within = total - between
    with np.errstate(divide="ignore", invalid="ignore"):
        return (between / (classes - 1)) / (within / (n - classes))


def _shares(weights: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return the positive weights of each row as shares of their sum; a softmax where no weight is positive."""
    positive = np.maximum(weights, 0)
    shares = np.where(positive.any(axis=1, keepdims=True), positive, np.exp(weights))
    return shares / shares.sum(axis=1, keepdims=True)
