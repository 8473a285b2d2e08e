"""K-step generation: unknown genes become known in the order of the model's confidence.

The paper describes it (Cui et al., "scGPT", Nature Methods 2024, "generative pretraining"): starting from a cell prompt
(a cell embedding) or a gene prompt (known genes with their values), the model predicts the unknown genes; those that it
predicts with most confidence become known, with their predicted value, and are attended to in the next of K steps.
scGPT's public code has no such loop. How many become known in a step, what confidence is and how a head's output
becomes a value is ours: docs/concepts/generation.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from scfm.data.batch import PackedBatch
from scfm.errors import ScfmError

if TYPE_CHECKING:
    from anndata import AnnData

    from scfm.pretrained import PretrainedModel

HEAD = "gep"


@dataclass
class Generated:
    """What was generated for the unknown genes of a pack, in the order of `batch.predicted`.

    Attributes:
        values: (U,) the value each gene became known with.
        confidence: (U,) how sure the model was, 0 to 1.
        step: (U,) int64 the step, from 1, in which it became known.
        raw: (U,) or (U, n_bins) the head's prediction in that step.
    """

    values: Tensor
    confidence: Tensor
    step: Tensor
    raw: Tensor


@torch.inference_mode()
def generate(
    network: nn.Module,
    batch: PackedBatch,
    steps: int,
    cell_prompt: Tensor | None = None,
    n_bins: int | None = None,
) -> Generated:
    """Generate the values of a pack's unknown genes in K steps.

    After step k, ceil(n k / K) of a cell's n unknown genes are known, the most confident first, ties by gene id. With
    one step the predictions are those of a single forward pass.

    Args:
        network: in evaluation mode, with a `gep` head that says how sure it is.
        batch: the pack; its known genes are the prompt.
        steps: K.
        cell_prompt: (N, D) cell embeddings that replace the first token of each cell in every step.
        n_bins: number of bins that a head with `nonzero` predicts; None for values that are not binned.

    Raises:
        ScfmError: fewer than one step, or a head that predicts values without saying how sure it is.
    """
    if steps < 1:
        raise ScfmError(f"steps: {steps} must be at least 1")
    check_head(network)
    asked = batch.predicted  # (U,)
    place = torch.empty_like(batch.cell_of_token).index_copy(0, asked, torch.arange(len(asked), device=asked.device))
    total = torch.bincount(batch.cell_of_token[asked], minlength=batch.n_cells)  # (N,)
    generated: Generated | None = None
    now, origin = batch, torch.arange(batch.n_tokens, device=asked.device)  # origin: where a token stood at the start
    for step in range(1, steps + 1):
        predictions = network(now, cell_prompt=cell_prompt).predictions
        raw = predictions[HEAD]
        values, confidence = read_out(raw, predictions.get(f"{HEAD}_nonzero"), n_bins)
        where = now.predicted
        if generated is None:
            generated = Generated(*(torch.empty_like(part) for part in (values, confidence, where, raw)))
        cell, at = now.cell_of_token[where], place[origin[where]]
        due = (total * step + steps - 1) // steps - (total * (step - 1) + steps - 1) // steps
        chosen = rank_in_cell(cell, confidence, now.genes[where]) < due[cell]
        fixed = at[chosen]
        generated.values[fixed], generated.confidence[fixed] = values[chosen], confidence[chosen]
        generated.step[fixed], generated.raw[fixed] = step, raw[chosen]
        if step < steps:
            now, order = grow(now, where[chosen], values[chosen])
            origin = origin[order]
    assert generated is not None
    return generated


def check_head(network: nn.Module) -> None:
    """Refuse a network that cannot say how sure it is. Raises ScfmError."""
    specs: Any = getattr(network, "specs", {})
    if HEAD not in specs:
        raise ScfmError(f"the model has no `{HEAD}` head, which predicts the values of unknown genes")
    if specs[HEAD].n_out == 1 and not specs[HEAD].nonzero:
        raise ScfmError(
            "the model's `gep` head learned by squared error: it says which value it expects, not how sure it is, so "
            "genes cannot be ordered by confidence; train with `loss: cross_entropy` or `nonzero: true`"
        )


def read_out(raw: Tensor, nonzero: Tensor | None, n_bins: int | None) -> tuple[Tensor, Tensor]:
    """Return the value of each prediction and how sure the model is of it, (U,) each.

    Logits over bins: the top bin and its probability. A value with the logit of being expressed: the value, rounded to
    a bin, where the gene is more likely expressed than not, else 0; the probability's distance from a half, doubled.
    """
    if raw.ndim == 2:
        confidence, values = raw.softmax(-1).max(-1)
        return values.to(raw.dtype), confidence
    assert nonzero is not None
    expressed = nonzero.sigmoid()
    values = raw if n_bins is None else raw.round().clamp(1, n_bins - 1)
    return torch.where(expressed >= 0.5, values, 0.0), (expressed - 0.5).abs() * 2


def rank_in_cell(cell: Tensor, confidence: Tensor, gene: Tensor) -> Tensor:
    """Return the place of each gene among those of its cell, (U,): most confident first, then by gene id."""
    order = gene.argsort(stable=True)
    order = order[confidence[order].argsort(descending=True, stable=True)]
    order = order[cell[order].argsort(stable=True)]
    first = torch.searchsorted(cell[order], cell[order])  # where the cell's genes begin
    places = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).index_copy(0, order, places - first)


def grow(batch: PackedBatch, learned: Tensor, values: Tensor) -> tuple[PackedBatch, Tensor]:
    """Return the pack in which some unknown genes are known, and (T,) where each of its tokens stood before.

    The mask is a length, so a gene becomes known by moving behind the known genes of its cell.
    """
    unknown = batch.unknown_mask.index_fill(0, learned, False)
    order = (batch.cell_of_token * 2 + unknown).argsort(stable=True)
    known = batch.values.index_copy(0, learned, values.to(batch.values.dtype))
    more = torch.bincount(batch.cell_of_token[learned], minlength=batch.n_cells)
    grown = replace(
        batch,
        genes=batch.genes[order],
        values=known[order],
        targets=None if batch.targets is None else batch.targets[order],
        n_known=batch.n_known + more.to(batch.n_known.dtype),
        levels=None,
        gene_conditions={name: index[order] for name, index in batch.gene_conditions.items()},
    )
    return grown, order


def generate_anndata(
    model: PretrainedModel,
    prompt: AnnData,
    genes: Sequence[str] | None,
    *,
    steps: int,
    start: Literal["genes", "cell"],
    tokens_per_pack: int,
) -> AnnData:
    """Return generated cells as a new AnnData; see `PretrainedModel.generate`."""
    from anndata import AnnData

    check_head(model.network)
    if start not in ("genes", "cell"):
        raise ScfmError(f"start: {start!r} is neither `genes` nor `cell`")
    store, conditions = model.store(prompt), model.conditions_of(prompt)
    asked = asked_genes(model, prompt, genes)
    tokens = model.files.tokens
    cells = max(1, tokens_per_pack // (tokens.max_genes + 1 + len(asked)))
    shape = (store.n_cells, len(asked))
    values, confidence, step = np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    for pack in model.packs(store, conditions, tokens_per_pack=cells * (tokens.max_genes + 1), cells_per_batch=cells):
        cell_prompt = None
        if start == "cell":
            with torch.inference_mode():
                cell_prompt = model.network(pack).cell
        question = ask(pack, asked.to(pack.genes.device), tokens.mask_value, model, keep_genes=start == "genes")
        answer = generate(model.network, question, steps, cell_prompt, tokens.bins)
        rows = pack.cell_id[pack.real_cells].cpu().numpy()
        for table, part in ((values, answer.values), (confidence, answer.confidence), (step, answer.step)):
            table[rows] = part.view(len(rows), len(asked)).cpu().numpy()
    entries = [model.files.vocabulary.entries[i] for i in asked.tolist()]
    generated = AnnData(values, obs=prompt.obs.copy(), layers={"confidence": confidence, "step": step})
    generated.var_names = [gene.symbol or gene.id for gene in entries]
    generated.var["id"] = [gene.id for gene in entries]
    generated.uns["scfm"] = model.provenance(prompt, store, conditions) | {"steps": steps, "start": start}
    return generated


def asked_genes(model: PretrainedModel, prompt: AnnData, genes: Sequence[str] | None) -> Tensor:
    """Return the vocabulary ids of the genes to generate, (G,). Raises ScfmError for unknown or repeated names."""
    from scfm.data.genes import genes_of

    vocabulary = model.files.vocabulary
    if genes is None:
        ids = vocabulary.match(*genes_of(prompt.var))
        return torch.from_numpy(np.unique(ids[ids >= 0]).astype(np.int64))
    names = list(genes)
    ids = vocabulary.match(names, names)
    unknown = [name for name, index in zip(names, ids.tolist(), strict=True) if not 0 <= index < vocabulary.n_genes]
    if unknown or len(set(ids.tolist())) < len(ids) or not names:
        wrong = f"not in the model's vocabulary: {unknown[:5]}" if unknown else "a gene stands there twice, or none"
        raise ScfmError(f"genes to generate: {wrong}")
    return torch.from_numpy(ids.astype(np.int64))


def ask(
    pack: PackedBatch, asked: Tensor, mask_value: float, model: PretrainedModel, *, keep_genes: bool
) -> PackedBatch:
    """Return the pack with the asked genes unknown in every cell, in the order asked; the others are known, or dropped.

    Args:
        pack: cells of which all genes are known.
        asked: (G,) gene ids.
        mask_value: value of an unknown gene.
        model: tells the conditions of genes.
        keep_genes: whether the cell's other genes stay; `<cls>` always does.
    """
    first = torch.zeros(pack.n_tokens, dtype=torch.bool, device=asked.device)
    first[pack.cu_seqlens[:-1].long()] = True
    kept = ~torch.isin(pack.genes, asked.to(pack.genes.dtype)) if keep_genes else first
    each = torch.arange(pack.n_cells, device=asked.device).repeat_interleave(len(asked))
    cell = torch.cat([pack.cell_of_token[kept], each])
    order = cell.argsort(stable=True)  # known tokens stand before the asked ones already
    genes = torch.cat([pack.genes[kept], asked.to(pack.genes.dtype).repeat(pack.n_cells)])[order]
    hidden = pack.values.new_full((pack.n_cells * len(asked),), mask_value)
    n_known = torch.bincount(pack.cell_of_token[kept], minlength=pack.n_cells)
    ends = (n_known + len(asked)).cumsum(0)
    conditions = model.files.tokeniser().conditions_of(genes.cpu().numpy())
    return replace(
        pack,
        genes=genes,
        values=torch.cat([pack.values[kept], hidden])[order],
        targets=None,
        cu_seqlens=torch.nn.functional.pad(ends, (1, 0)).to(pack.cu_seqlens.dtype),
        n_known=n_known.to(pack.n_known.dtype),
        gene_conditions={name: torch.from_numpy(index).to(asked.device) for name, index in conditions.items()},
    )
