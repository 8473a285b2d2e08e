"""Genes that a model's vocabulary lacks: they join it with the mean of all gene embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from scfm.checkpoints.native import ModelFiles
from scfm.checkpoints.scgpt.form import MODALITIES
from scfm.checkpoints.scgpt.settings import modality_of
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.errors import ScfmError

EMBEDDING = "backbone.gene_embedding.embedding.weight"


def add_genes(
    files: ModelFiles, weights: Mapping[str, Tensor], genes: Sequence[Gene]
) -> tuple[ModelFiles, dict[str, Tensor]]:
    """Return the model with further genes at the end of its vocabulary, before `<pad>`; the card says so.

    They start from the mean of all gene embeddings: until the model is trained on them, they tell it only that some
    gene has a value.

    Args:
        files: what describes the model.
        weights: its tensors by name; not changed.
        genes: the new genes; those that the vocabulary has already are passed over.

    Raises:
        ScfmError: the vocabulary has them all, or the model is none of scGPT's.
    """
    if files.model.name != "scgpt":
        raise ScfmError(f"--add-genes: a model of the kind {files.model.name} reads the genes that it was trained on")
    vocabulary = files.vocabulary
    n = vocabulary.n_genes
    matched = vocabulary.match([gene.ensembl for gene in genes], [gene.symbol for gene in genes])
    ids = {gene.id for gene in vocabulary.entries}
    new = [gene for gene, entry in zip(genes, matched.tolist(), strict=True) if entry < 0 and gene.id not in ids]
    if not new:
        raise ScfmError(f"the vocabulary has all of these {len(genes)} genes already")
    table = weights[EMBEDDING]
    mean = table[:n].double().mean(0).to(table.dtype)
    extended = torch.cat([table[:n], mean.expand(len(new), -1), table[n:]])
    entries = [*vocabulary.entries[:n], *new, *vocabulary.entries[n:]]
    tables = {
        name: [*index[:n], *(condition_of(gene, files.gene_conditions[name]) for gene in new), *index[n:]]
        for name, index in files.gene_tables.items()
    }
    card = (
        f"{files.card.rstrip()}\n\n## Added genes\n{len(new):,} genes joined the vocabulary after training, each with "
        f"the mean of the {n:,} embeddings of the others: the model knows nothing of them until it is trained on "
        f"data that hold them. The first are {', '.join(gene.symbol or gene.id for gene in new[:10])}.\n"
    )
    training = with_rows(files, n, len(new)) | {"added_genes": [gene.id for gene in new]}
    extended_files = replace(
        files, vocabulary=Vocabulary(entries), gene_tables=tables, training_data=training, card=card
    )
    return extended_files, {**weights, EMBEDDING: extended}


def condition_of(gene: Gene, conditions: Sequence[str]) -> int:
    """Return a new gene's index in a gene condition: its modality, and of all else what index 0 stands for, none."""
    return modality_of(gene) if conditions == MODALITIES else 0


def with_rows(files: ModelFiles, n: int, n_new: int) -> dict[str, object]:
    """Return training_data, where a converted model's order of scGPT's rows has the new genes at its end."""
    converted = files.training_data.get("converted")
    if converted is None or converted["rows"] is None:
        return dict(files.training_data)
    rows = [row + n_new if row >= n else row for row in converted["rows"]]
    return files.training_data | {"converted": converted | {"rows": [*rows, *range(n, n + n_new)]}}
