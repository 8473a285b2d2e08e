"""A linear probe while training goes on: how well do the cell embeddings of now tell the types of other cells?

The loss alone picks poor representations: it goes on falling where the embedding has stopped to improve. So a
logistic regression is fitted on frozen embeddings of a small labelled file at every validation, always on the same
cells, and judged on the others; and once, for comparison, on the log counts of the same cells.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from scfm.baselines.inputs import ExpressionRule, read_labels
from scfm.data.hashing import overlap, store_hashes
from scfm.errors import ScfmError
from scfm.evaluation.splits import stratified_split
from scfm.pretrained import PretrainedModel
from scfm.recipe import ProbeConfig
from scfm.training.module import FoundationModule
from scfm.training.together import Together

if TYPE_CHECKING:
    from scfm.training.run import Job

JUDGED = 0.5  # share of the cells of every label on which the regression is judged
TOKENS_PER_PACK = 16384


class Probe(L.Callback):
    """Logs probe/accuracy and probe/macro_f1 at every validation.

    The processes of a run share the cells out; rank 0 fits, and all are told the scores, or what went wrong.

    Args:
        config: the recipe's probe section.
        job: what is trained on what.
        together: the processes of the run.

    Raises ScfmError where the file cannot be read, has no such labels, or too few cells of them.
    """

    def __init__(self, config: ProbeConfig, job: Job, together: Together) -> None:
        from scfm.evaluation.asked import read_cells

        adata = read_cells([config.data], config.label)
        self.together, self.seed = together, job.recipe.seed
        # what reads cells as the model does; the network itself comes with every validation
        self.reader = PretrainedModel(nn.Identity(), replace(job.files), "this run")
        self.store = self.reader.store(adata)
        self.conditions = self.reader.conditions_of(adata)
        self.labels = read_labels(adata, config.label)
        self.split = stratified_split(self.labels, JUDGED, self.seed)
        self.log_counts = ExpressionRule.learn(adata[self.split.train]).apply(adata)
        known = job.files.cell_hashes
        self.seen = None if known is None else int(overlap(known, store_hashes(self.store)).sum())
        self.name = f"probe of {config.label} in {config.data}"

    @property
    def said(self) -> str:
        """What the log says of the cells, above all whether the model trains on them."""
        n = len(self.labels)
        cells = f"{self.name}: {n:,} cells, {len(set(self.labels))} labels, {len(self.split.test):,} cells to judge by"
        if self.seen is None:
            return f"{cells}; whether they are among the training cells is not known"
        if self.seen:
            return f"{cells}; {self.seen:,} of them ({self.seen / n:.1%}) ARE AMONG THE TRAINING CELLS, it may flatter"
        return f"{cells}; none of them is among the training cells"

    def baseline(self) -> dict[str, float]:
        """Return what the same regression scores on log counts of all genes, as names of metrics."""
        return {f"probe/baseline_{name}": score for name, score in self.scores(self.log_counts).items()}

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        assert isinstance(pl_module, FoundationModule)
        for name, score in self.found(trainer, pl_module.network).items():
            pl_module.log(f"probe/{name}", score, logger=False)

    def found(self, trainer: L.Trainer, network: nn.Module) -> dict[str, float]:
        """Return the scores of a network as it is now, the same in every process; called by all of them."""
        group, mine = self.together.agreement.group, self.embedded(trainer, network)
        if group is None:
            return self.scores(in_order([mine]))
        everyone: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(everyone, mine, group)
        told: list[Any] = [None]
        if trainer.is_global_zero:
            try:
                told = [self.scores(in_order(everyone))]
            except Exception as error:  # the others wait to be told, whatever it is
                told = [f"{self.name}: {type(error).__name__}: {error}"]
        dist.broadcast_object_list(told, 0, group)
        if isinstance(told[0], str):
            raise ScfmError(told[0])
        return told[0]

    def embedded(self, trainer: L.Trainer, network: Any) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the rows of this process's share of the cells (n,) and their embeddings, of length 1, (n, D)."""
        self.reader.device = trainer.strategy.root_device
        packs = self.reader.packs(
            self.store, self.conditions, TOKENS_PER_PACK, rank=trainer.global_rank, world_size=trainer.world_size
        )
        rows, cells = [], []
        for pack in packs:  # as many for every process: a sharded network computes in all of them at once
            with trainer.precision_plugin.forward_context():
                cell = network(pack).cell
            real = pack.real_cells.cpu().numpy()
            rows.append(pack.cell_id.cpu().numpy()[real])
            cells.append(nn.functional.normalize(cell.float(), dim=-1).cpu().numpy()[real])
        return np.concatenate(rows), np.concatenate(cells)

    def scores(self, cells: Any) -> dict[str, float]:
        """Return accuracy and macro F1 of a logistic regression on cells: (n, D), dense or sparse."""
        from scipy.sparse import issparse
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import accuracy_score, f1_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        model = make_pipeline(
            StandardScaler(with_mean=not issparse(cells)),  # a sparse matrix stays sparse, the intercept takes the mean
            LogisticRegression(class_weight="balanced", max_iter=1000, random_state=self.seed),
        )
        train, test = self.split.train, self.split.test
        predicted = model.fit(cells[train], self.labels[train]).predict(cells[test])
        truth = self.labels[test]
        return {
            "accuracy": float(accuracy_score(truth, predicted)),
            "macro_f1": float(f1_score(truth, predicted, average="macro")),
        }


def in_order(parts: list[tuple[NDArray[np.int64], NDArray[np.float32]]]) -> NDArray[np.float32]:
    """Return embeddings (n, D) in the order of their rows, from parts of (rows, embeddings)."""
    rows = np.concatenate([rows for rows, _ in parts])
    return np.concatenate([cells for _, cells in parts])[np.argsort(rows)]
