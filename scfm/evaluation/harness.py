"""Run every method on the same splits with the same seeds, obligatory baselines and controls always among them."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from scfm.errors import ScfmError
from scfm.evaluation.leakage import Leakage, TrainedOn, count_leakage, leakage_of, refuse_leakage
from scfm.evaluation.metrics import METRICS
from scfm.evaluation.protocol import KINDS, EvaluationProtocol, Kind, LabelledCells, Method, Outcome
from scfm.evaluation.protocols import protocol_of
from scfm.evaluation.provenance import data_hash
from scfm.evaluation.splits import Split
from scfm.evaluation.stopwatch import Stopwatch
from scfm.threads import same_threads

if TYPE_CHECKING:
    import anndata


@runtime_checkable
class Pretrained(Protocol):
    """A method that brings along what it saw before it was fitted here."""

    @property
    def training_hashes(self) -> NDArray[np.uint64] | None:
        """The sorted profile hashes of all training cells (`cells.hash`), or None where they are not known."""
        ...


@runtime_checkable
class Sized(Protocol):
    """A method that can say how many numbers it has learned."""

    @property
    def parameters(self) -> int | None:
        """Parameters of what was fitted last; None before."""
        ...


@dataclass(frozen=True)
class Run:
    """One method on one split.

    Attributes:
        outcome: scores, and what figures and intervals are made from; None where the method failed.
        failure: why it failed, in one line.
        trace: where it failed, for whoever mends it.
        leakage: held-out cells among the training cells, pretraining included; None where those are not known.
        seconds_fit, seconds_predict: wall time.
        peak_mib: the most memory that the process held meanwhile; None where the system does not tell.
        parameters: of the fitted method, where it says so.
    """

    method: str
    kind: Kind
    split: int
    seed: int
    outcome: Outcome | None
    failure: str | None = None
    trace: str | None = None
    leakage: Leakage | None = None
    seconds_fit: float = 0.0
    seconds_predict: float = 0.0
    peak_mib: float | None = None
    parameters: int | None = None

    @property
    def values(self) -> dict[str, float]:
        """Scores by metric; none where the method failed."""
        return self.outcome.scores.values if self.outcome else {}

    @property
    def scores(self) -> Any:
        """What the task made of the output. Raises ScfmError where the method failed."""
        if self.outcome is None:
            raise ScfmError(f"{self.method}: failed, and has no scores ({self.failure})")
        return self.outcome.scores

    @property
    def predicted(self) -> NDArray[np.str_]:
        """(n_test,) labels, in the order of `split.test`. Raises ScfmError where the task predicts none."""
        if self.outcome is None or self.outcome.predicted is None:
            raise ScfmError(f"{self.method}: predicted no labels")
        return self.outcome.predicted


@dataclass(frozen=True)
class Summary:
    """A score over seeds: its mean and standard deviation (None with a single seed)."""

    mean: float
    sd: float | None
    n: int

    def __str__(self) -> str:
        if np.isnan(self.mean):
            return "–"
        return f"{self.mean:.3f}" if self.sd is None else f"{self.mean:.3f} ± {self.sd:.3f}"


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: all a report needs.

    Attributes:
        protocol: what was asked, and how.
        cells: the cells that it was asked on.
        labels: the fixed label list: every type with a held-out cell in some split.
        support: cells of each listed type in the whole data set.
        excluded: types that are never held out, and so are not scored.
        splits: one per seed.
        runs: one per method and split.
        kinds: method name -> model, baseline or control.
        descriptions: method name -> what it does.
        duplicates: per split, held-out cells whose exact profile is also among the training cells; None without hashes.
        data_sha256: hash of cells, genes, labels and values.
        curve: rows as those of `rows()` with fewer training cells, each with `cells_per_type` and `training_cells`.
    """

    protocol: EvaluationProtocol
    cells: LabelledCells
    labels: list[str]
    support: list[int]
    excluded: list[str]
    splits: list[Split]
    runs: list[Run]
    kinds: dict[str, Kind]
    descriptions: dict[str, str]
    duplicates: list[Leakage] | None
    data_sha256: str
    curve: list[dict[str, Any]] = field(default_factory=list)

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.protocol.name

    @property
    def label(self) -> str:
        """The obs column of the labels."""
        return self.cells.label

    @property
    def truth(self) -> NDArray[np.str_]:
        """(N,) label of every cell."""
        return self.cells.truth

    @cached_property
    def cell_names(self) -> NDArray[np.str_]:
        """(N,) obs names."""
        return self.cells.adata.obs_names.to_numpy(dtype=str)

    @cached_property
    def held_out(self) -> list[int]:
        """Cells of each listed type that are held out in some split, each counted once."""
        truth = self.truth[np.unique(np.concatenate([split.test for split in self.splits]))]
        return [int((truth == name).sum()) for name in self.labels]

    @cached_property
    def split_hashes(self) -> list[str]:
        """The sha256 of each split."""
        return [split.hash(self.cell_names.tolist()) for split in self.splits]

    @property
    def passed(self) -> bool:
        """Whether no method failed."""
        return not any(run.failure for run in self.runs)

    def runs_of(self, method: str) -> list[Run]:
        """Return a method's runs that came to an end, in the order of the splits."""
        return [run for run in self.runs if run.method == method and run.outcome is not None]

    def failure(self, method: str) -> str | None:
        """Return why a method failed, on the first split where it did, or None."""
        failed = [run for run in self.runs if run.method == method and run.failure]
        if not failed:
            return None
        seeds = ", ".join(str(run.seed) for run in failed)
        of = "" if len(failed) == len(self.splits) else f" (seed {seeds})"
        return f"failed{of}: {failed[0].failure}"

    def embeddings(self, split: int = 0) -> dict[str, NDArray]:
        """Return method name -> embedding (n, d) of a split's training cells, then its held-out ones."""
        return {
            run.method: run.outcome.embedding
            for run in self.runs
            if run.split == split and run.outcome is not None and run.outcome.embedding is not None
        }

    def names(self, *kinds: Kind) -> list[str]:
        """Return the names of the methods of some kinds, in the order they ran."""
        return [name for name, its in self.kinds.items() if its in kinds]

    def ranked(self, *kinds: Kind) -> list[str]:
        """Return those of them that failed on no split."""
        return [name for name in self.names(*kinds) if self.failure(name) is None]

    def summary(self, method: str, metric: str) -> Summary:
        """Return mean and standard deviation of a score over the splits where the method came to an end."""
        values = np.array([run.values[metric] for run in self.runs_of(method) if metric in run.values])
        if not len(values):
            return Summary(float("nan"), None, 0)
        return Summary(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None, len(values))

    def mean_seconds(self, method: str) -> float:
        """Return the wall time to fit and predict, averaged over the splits where the method came to an end."""
        return float(np.mean([run.seconds_fit + run.seconds_predict for run in self.runs_of(method)]))

    def best(self, metric: str, *kinds: Kind) -> str | None:
        """Return the method of some kinds with the best mean score, or None where there is none."""
        sign = 1 if METRICS[metric].higher_is_better else -1
        scored = [name for name in self.ranked(*kinds) if not np.isnan(self.summary(name, metric).mean)]
        return max(scored, key=lambda name: sign * self.summary(name, metric).mean, default=None)

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row per method, seed and metric, and one per failed run, whose metric and value are None."""
        return [
            {
                "task": self.task,
                "method": run.method,
                "kind": run.kind,
                "seed": run.seed,
                "split_sha256": self.split_hashes[run.split],
                "data_sha256": self.data_sha256,
                "metric": metric,
                "value": value,
                "failure": run.failure,
                "cells_seen_in_training": run.leakage.seen if run.leakage else None,
                "seconds_fit": round(run.seconds_fit, 3),
                "seconds_predict": round(run.seconds_predict, 3),
                "peak_mib": None if run.peak_mib is None else round(run.peak_mib, 1),
                "parameters": run.parameters,
            }
            for run in self.runs
            for metric, value in (run.values.items() if run.outcome else [(None, None)])
        ]


def compare(
    methods: Sequence[Method],
    adata: anndata.AnnData,
    label: str,
    splits: Sequence[Split],
    *,
    task: str | EvaluationProtocol = "annotation",
    batch: str | None = None,
    donor: str | None = None,
    controls: Sequence[tuple[Method, Kind]] = (),
    cell_hashes: NDArray[np.uint64] | None = None,
    trained_on: Mapping[str, TrainedOn] | None = None,
    strict: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Score methods beside the task's obligatory baselines and controls, all on the same splits with the same seeds.

    A method that fails is a run with the reason; the others go on.

    Args:
        methods: What is to be judged; the baselines and controls of the task are added here and need not be given.
        adata: The cells.
        label: obs column of the labels.
        splits: One per seed, of the rows of `adata`.
        task: A registered task, or a protocol of your own.
        batch: obs column of the batches, for tasks that need one.
        donor: obs column of the donors, over which intervals are given as well.
        controls: More controls than the task's own, as random weights of a model.
        cell_hashes: (N,) profile hash of each row of `adata`; with them overlap with the training cells is counted.
        trained_on: method name -> what that method says it was trained on, where it was before it came here.
        strict: refuse a method that was trained on held-out cells, or does not say what it was trained on.
        say: is told which method runs on which split.

    Raises ScfmError for an unknown task, no split, two methods of one name, missing labels or batches, a method that
    knows its training cells while no hashes are given, and under `strict` for leakage.
    """
    protocol = protocol_of(task) if isinstance(task, str) else task
    if not splits:
        raise ScfmError("no split to compare on; draw one per seed with stratified_split")
    if protocol.needs_batch and batch is None:
        raise ScfmError(f"{protocol.name}: names no batch column; it is needed to say what should be mixed")
    cells = LabelledCells(adata, label, batch, donor)
    candidates: list[tuple[Method, Kind]] = [(method, "model") for method in methods]
    candidates += [(baseline, "baseline") for baseline in protocol.baselines()]
    candidates += sorted([*controls, *protocol.controls(cells)], key=lambda pair: KINDS.index(pair[1]))
    if odd := [method.name for method, _ in candidates if not isinstance(method.name, str) or not method.name.strip()]:
        raise ScfmError(f"the name of a method is text to be printed in tables; {odd[0]!r} is not")
    counted = Counter(method.name for method, _ in candidates)
    if repeated := [name for name, n in counted.items() if n > 1]:
        raise ScfmError(f"method names repeat: {', '.join(repeated)}")
    labels, support = np.unique(cells.truth, return_counts=True)
    held_out = set(cells.truth[np.concatenate([split.test for split in splits])])
    listed = [str(name) for name in labels if name in held_out]

    counted_before = {
        (name, k): leakage_of(known, cells, split.test)
        for name, known in (trained_on or {}).items()
        for k, split in enumerate(splits)
    }
    if strict:
        for (name, _), leakage in counted_before.items():
            refuse_leakage(name, leakage)
    runs: list[Run] = []
    duplicates: list[Leakage] = []
    for k, split in enumerate(splits):
        if cell_hashes is not None and not protocol.transductive:
            duplicates.append(count_leakage(cell_hashes[split.test], np.sort(cell_hashes[split.train])))
        for method, kind in candidates:
            say(f"seed {split.seed}: {method.name}")
            leakage, said_before = counted_before.get((method.name, k)), (method.name, k) in counted_before
            run = run_method(protocol, method, kind, cells, split, k, listed, shown=k == 0)
            if not said_before and isinstance(method, Pretrained) and (known := method.training_hashes) is not None:
                if cell_hashes is None:
                    raise ScfmError(f"{method.name} knows its training cells: pass cell_hashes to check for leakage")
                leakage = count_leakage(cell_hashes[split.test], known)
            if strict and kind == "model" and not said_before and run.failure is None:
                refuse_leakage(method.name, leakage)
            runs.append(replace(run, leakage=leakage))
    return Comparison(
        protocol=protocol,
        cells=cells,
        labels=listed,
        support=[int(n) for name, n in zip(labels, support, strict=True) if name in held_out],
        excluded=[str(name) for name in labels if name not in held_out],
        splits=list(splits),
        runs=runs,
        kinds={method.name: kind for method, kind in candidates},
        descriptions={method.name: method.describe() for method, _ in candidates},
        duplicates=duplicates or None,
        data_sha256=data_hash(adata, label),
    )


def run_method(
    protocol: EvaluationProtocol,
    method: Method,
    kind: Kind,
    cells: LabelledCells,
    split: Split,
    number: int,
    labels: list[str],
    *,
    shown: bool,
) -> Run:
    """Run a method on a split; what it raises becomes the reason of a failed run.

    Args:
        protocol: of the task.
        method: what is judged.
        kind: model, baseline or control.
        cells: all cells.
        split: which of them train and which are held out.
        number: of the split.
        labels: the fixed label list.
        shown: whether the report shows the embeddings of this split.
    """
    watch = Stopwatch()
    outcome = failure = trace = None
    try:
        with same_threads():
            outcome = protocol.run(method, cells, split, labels, watch.measure, shown)
    except Exception as error:  # methods are other people's code: whatever they raise, the others go on
        failure = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, ScfmError):
            failure = f"{type(error).__name__}: {failure}"
        trace = traceback.format_exc()
    return Run(
        method.name,
        kind,
        number,
        split.seed,
        outcome,
        failure,
        trace,
        seconds_fit=watch.seconds["fit"],
        seconds_predict=watch.seconds["predict"],
        peak_mib=watch.peak_mib,
        parameters=method.parameters if failure is None and isinstance(method, Sized) else None,
    )
