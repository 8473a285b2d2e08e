"""From a native model to a file that scBERT loads, and from which scfm gets the same model back."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from scfm.checkpoints.drop import without
from scfm.checkpoints.gene_names import names_of
from scfm.checkpoints.native import ModelFiles
from scfm.checkpoints.record import Record, write_record
from scfm.checkpoints.report import Report
from scfm.checkpoints.scbert.names import GENES, TABLE, Genes, layout_of, pairs_of
from scfm.checkpoints.scbert.reading import GENE_LIST, WRAPPED, numbers_in, parts_of, tokens_of
from scfm.data.vocabulary import Vocabulary
from scfm.errors import ScfmError

WEIGHTS, LABEL_LIST = "scbert.pth", "labels.txt"


@dataclass
class Export:
    """A model as scBERT keeps it.

    Attributes:
        state: tensors under scBERT's names.
        genes: names of the genes in its order.
        record: what scBERT has no place for.
        report: what was done.
    """

    state: dict[str, Tensor]
    genes: list[str]
    record: Record
    report: Report


def to_scbert(
    files: ModelFiles, weights: Mapping[str, Tensor], drop: Sequence[str] = (), order: Vocabulary | None = None
) -> Export:
    """Convert a native model.

    Args:
        files: what describes it.
        weights: its tensors by native name.
        drop: patterns of tensors to leave behind: whole heads.
        order: the same genes in the order that scBERT should have; None for the model's.

    Raises:
        ScfmError: lists all of the model that scBERT has no place for, or the genes that one of the two lacks.
    """
    heads, dropped = without(files, drop, weights)
    files = replace(files, heads=heads)
    check(files)
    genes = Genes(files.vocabulary, order_of(files.vocabulary, order))
    state: dict[str, Tensor] = {}
    for pair in pairs_of(files):
        state |= pair.to_theirs(weights[pair.native], genes)
    names = names_of(files.vocabulary)
    kind = table_type(files, weights[TABLE])
    said = notes(files, has_table=kind is not None)
    if kind is None:
        del state[GENES]
        said.append(f"all gene vectors are zeros: {GENES} is left out")
    else:
        state[GENES] = state[GENES].to(kind)
    if kind is torch.float64:
        said.append(f"{GENES} is float64, as scBERT keeps it, with the values of float32")
    state = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    report = Report(layout_of(files), parts_of(state), numbers_in(state), dropped, said)
    special = [i for i in range(files.vocabulary.n_genes, len(names)) if i != files.vocabulary.cls]
    kept = {str(i): weights[TABLE][i].tolist() for i in special if weights[TABLE][i].any()}
    return Export(state, [names[i] for i in genes.native_of], Record(files, list(genes.native_of), [], kept), report)


def order_of(vocabulary: Vocabulary, order: Vocabulary | None) -> list[int]:
    """Return the vocabulary's index of every gene of an order.

    Raises ScfmError unless both name the same genes.
    """
    if order is None:
        return list(range(vocabulary.n_genes))
    listed = order.entries[: order.n_genes]
    entries = vocabulary.match([gene.ensembl for gene in listed], [gene.symbol for gene in listed]).tolist()
    names = names_of(vocabulary)
    unknown = [gene.id for gene, entry in zip(listed, entries, strict=True) if not 0 <= entry < vocabulary.n_genes]
    lacking = [names[i] for i in sorted(set(range(vocabulary.n_genes)) - set(entries))]
    wrong = [
        f"{len(genes):,} genes are not in the {where}, e.g. {', '.join(genes[:5])}"
        for genes, where in ((unknown, "model"), (lacking, "list"))
        if genes
    ]
    if not wrong and len(set(entries)) < len(entries):
        wrong = ["two names mean the same gene"]
    if wrong:
        raise ScfmError(f"--vocabulary: scBERT's order must name the genes of the model: {'; '.join(wrong)}")
    return entries


def check(files: ModelFiles) -> None:
    """Raise ScfmError that lists all that scBERT has no place for, with the option that drops it where one exists."""
    model = files.model
    if model.name != "scbert":
        raise ScfmError(f"a model of the kind {model.name} is none of scBERT's")
    wrong = []
    if model.mixer != "favor":
        wrong.append(f"model.mixer {model.mixer}: scBERT has favor")
    wrong += [
        f"head {head.task} is of the kind {head.kind}; --drop 'heads.{head.task}.*' leaves it behind"
        for head in files.heads
        if head.kind not in ("bins", "genes")
    ]
    theirs = [head for head in files.heads if head.kind in ("bins", "genes")]
    if len(theirs) > 1:
        tasks = " or ".join(f"'heads.{head.task}.*'" for head in theirs)
        wrong.append(f"{len(theirs)} heads, where scBERT has one, to_out; --drop {tasks}")
    if not theirs:
        wrong.append("no head of bins (masked_bin) and none of classes that reads genes: scBERT needs one for to_out")
    if wrong:
        raise ScfmError("scBERT cannot hold this model:\n  " + "\n  ".join(wrong))


def notes(files: ModelFiles, *, has_table: bool) -> list[str]:
    """Return in words how scBERT must be built for these tensors, and what it computes in another way than scfm."""
    model, form = files.model, files.model.performer
    built = {
        "num_tokens": files.tokens.n_bins + 1,
        "max_seq_len": files.vocabulary.n_genes + 1,
        "dim": model.width,
        "depth": model.layers,
        "heads": model.heads,
        "dim_head": form.head_width,
        "nb_features": form.features,
        "generalized_attention": form.kernel in ("relu", "gelu"),
        "no_projection": form.kernel == "none",
        "use_scalenorm": form.norm == "scale",
        "use_rezero": form.norm == "rezero",
        "ff_glu": form.glu,
        "reversible": form.reversible,
        "tie_embed": form.tied,
        "qkv_bias": form.qkv_bias,
        "kernel_fn": "torch.nn.GELU()" if form.kernel == "gelu" else None,
    }
    given = {name: value for name, value in built.items() if value not in (None, False)}
    given |= {} if has_table else {"g2v_position_emb": False}
    arguments = ", ".join(f"{name}={value}" for name, value in given.items())
    said = [f"scBERT's file does not say how to build its model: PerformerLM({arguments})"]
    if form.mode == "correct":
        said.append("the model was trained in the mode correct: scBERT's outputs differ, by batch mates among others")
    theirs = tokens_of(files.tokens.n_bins, files.vocabulary)
    read = ("genes", "values", "cls_value", "mask_value")
    other = [name for name in read if getattr(files.tokens, name) != getattr(theirs, name)]
    other += ["max_genes"] if files.tokens.max_genes < theirs.max_genes else []
    if other or files.value_kind != "counts":
        said.append(f"scBERT reads cells in another way: data.{', data.'.join(other or ['values'])} is not as there")
    return said


def table_type(files: ModelFiles, table: Tensor) -> torch.dtype | None:
    """Return the type of scBERT's gene table, as it was where the model came from scBERT; None where it has none."""
    converted = files.training_data.get("converted")
    if converted is not None:
        return getattr(torch, converted["gene_table"]) if converted["gene_table"] else None
    return torch.float64 if table.any() else None


def write_scbert(folder: Path, export: Export) -> None:
    """Write scbert.pth, genes.txt, scfm.json and the names of classes under a temporary name, then rename the folder.

    Raises:
        ScfmError: the folder holds anything.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ScfmError(f"{folder}: is not empty; choose another directory")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    labels = [label for head in export.record.files.heads for label in head.labels or []]
    for name, lines in ((GENE_LIST, export.genes), (LABEL_LIST, labels)):
        if lines:
            (partial / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    weights = partial / WEIGHTS
    torch.save({WRAPPED: export.state}, weights)
    write_record(partial, export.record, weights)
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
