"""Annotation without training the model: its frozen cell embeddings, read by neighbours or by a linear classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scfm.data.batch import PackedBatch
from scfm.data.store import CellStore, Codes
from scfm.model.heads import HeadSpec
from scfm.recipe import TaskConfig

if TYPE_CHECKING:
    from scfm.pretrained import PretrainedModel
    from scfm.training.run import Job
    from scfm.training.rundir import RunDirectory

HEAD = "annotation"
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)  # of the classifier, as scikit-learn's C: the best on the validation cells


def frozen_head(task: TaskConfig, labels: list[str], n_cells: int) -> HeadSpec:
    """Return the head of a frozen setting: a linear layer, or the cells it learns from and their votes."""
    if task.setting == "probe":
        return HeadSpec(HEAD, "cls", len(labels), labels, layers=1)
    return HeadSpec(HEAD, "neighbours", len(labels), labels, references=n_cells, neighbours=task.neighbours)


def fit_frozen(job: Job, run: RunDirectory, task: TaskConfig) -> None:
    """Fit the head of a job on frozen cell embeddings, and write the model directory of its run."""
    from scfm.pretrained import PretrainedModel
    from scfm.training.callbacks import MetricsCsv
    from scfm.training.run import write_model_directory

    model = PretrainedModel(job.network, job.files, str(job.recipe.from_model))
    rows = np.concatenate([job.train_rows, job.valid_rows]).astype(np.int64)
    backbone, head = network_parts(job.network)
    cells = per_cell(model, job.store, rows, job.cell_conditions, lambda pack: backbone(pack)[-1])
    classes, n_train = np.asarray(job.cell_conditions["label"][rows], np.int64), len(job.train_rows)
    seen, held_out = slice(None, n_train), slice(n_train, None)
    if task.setting == "probe":
        weights = fit_probe(cells[seen], classes[seen], cells[held_out], classes[held_out], task, job.recipe.seed)
        head.load_state_dict(dict(zip(("out.weight", "out.bias"), weights, strict=True)))
    else:
        head.learn(torch.from_numpy(cells[seen]), torch.from_numpy(classes[seen]))
    lines = [*job.notes, f"{task.setting}: {n_train:,} cells to learn from, {len(rows) - n_train:,} to validate"]
    if len(job.valid_rows):
        with torch.inference_mode():
            predicted = head.cpu()(torch.from_numpy(cells[held_out])).argmax(-1).numpy()
        accuracy = float((predicted == classes[held_out]).mean())
        MetricsCsv(run.metrics, None).log_metrics({"valid/cls_accuracy": accuracy}, step=0)
        lines.append(f"valid/cls_accuracy {accuracy:.4g}")
    # judged by what was measured: neighbours without a vote for the true type would make a loss infinite
    job.recipe = replace(job.recipe, checkpoint=replace(job.recipe.checkpoint, best="valid/cls_accuracy"))
    write_model_directory(job, run)
    lines.append(f"model: {run.model}")
    with run.log.open("a", encoding="utf-8") as log:
        for line in lines:
            print(line, flush=True)
            log.write(line + "\n")


def network_parts(network: Any) -> tuple[Any, Any]:
    """Return the backbone and the annotation head of a network."""
    return network.backbone, network.heads[HEAD]


def per_cell(
    model: PretrainedModel,
    store: CellStore,
    rows: NDArray[np.int64],
    conditions: Mapping[str, Codes],
    read: Callable[[PackedBatch], Tensor],
    tokens_per_pack: int = 16384,
) -> NDArray[np.float32]:
    """Return what is read of each cell of some rows, in their order: (n, d), as `embed` and `predict` would see it."""
    place = np.full(store.n_cells, -1)
    place[rows] = np.arange(len(rows))
    result: NDArray[np.float32] | None = None
    for pack in model.packs(store, conditions, tokens_per_pack, rows=rows):
        with torch.inference_mode():
            numbers = read(pack).float().cpu().numpy()  # (N, d)
        if result is None:
            result = np.empty((len(rows), numbers.shape[1]), np.float32)
        real = pack.real_cells.cpu().numpy()
        result[place[pack.cell_id.cpu().numpy()[real]]] = numbers[real]
    assert result is not None  # a task has at least two labels, and so cells
    return result


def fit_probe(
    cells: NDArray[np.float32],
    classes: NDArray[np.int64],
    valid_cells: NDArray[np.float32],
    valid_classes: NDArray[np.int64],
    task: TaskConfig,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Return weight (C, D) and bias (C,) of a logistic regression on embeddings (n, D), each column at unit variance.

    The L2 penalty is that of the lowest loss on the validation cells; without any it is scikit-learn's default.
    Standardisation is folded into the weights, so that they read the embedding itself.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    mean, scale = cells.mean(0), np.maximum(cells.std(0), 1e-6)
    balance: Any = "balanced" if task.class_weights == "balanced" else None
    fitted = []
    for strength in STRENGTHS if len(valid_cells) else (1.0,):
        regression = LogisticRegression(C=strength, class_weight=balance, max_iter=1000, random_state=seed)
        regression.fit((cells - mean) / scale, classes)
        loss = 0.0
        if len(valid_cells):
            found = regression.predict_proba((valid_cells - mean) / scale)
            loss = log_loss(valid_classes, found, labels=regression.classes_)
        fitted.append((loss, regression))
    best = min(fitted, key=lambda pair: pair[0])[1]
    weight, bias = best.coef_, best.intercept_
    if len(weight) == 1:  # of two classes scikit-learn keeps the difference
        weight, bias = np.concatenate([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])
    weight = weight / scale
    return torch.from_numpy(weight).float(), torch.from_numpy(bias - weight @ mean).float()
