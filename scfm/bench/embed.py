"""`scfm bench embed`: cell embeddings of synthetic cells, from sparse rows in memory to vectors on the host."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from scfm.bench.cells import synthetic_store
from scfm.bench.report import at_least_one, device_name, of_rates, publish, significant
from scfm.bench.train import GENES, VOCABULARY
from scfm.data.store import CellStore
from scfm.errors import ScfmError
from scfm.model.attention import pick_backend
from scfm.model.precision import Precision
from scfm.pretrained import PretrainedModel, load
from scfm.recipe import Recipe
from scfm.training.run import pretraining_job

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def embed(
    recipe: Recipe,
    precision: Precision = "fp32",
    cells: int = 1024,
    genes: int = GENES,
    vocabulary: int = VOCABULARY,
    repeats: int = 3,
    out: str | None = None,
) -> None:
    """Time the embedding of synthetic cells, with fresh weights or those of `from`, and print the result as JSON.

    Args:
        recipe: Shape and tokenisation of the model; `from` names a model directory instead.
        precision: `bf16` is measured beside fp32, to compare with.
        cells: Synthetic cells.
        genes: Mean number of expressed genes in a cell.
        vocabulary: Genes of the vocabulary where there is no model directory.
        repeats: Timed passes over the cells, after one that warms up.
        out: File that also receives the JSON.
    """
    result = bench_embed(recipe, precision, cells, genes, vocabulary, repeats)
    speeds = ", ".join(
        f"{speed['median']:,.1f} cells/s in {name}" for name, speed in result["cells_per_second"].items()
    )
    near = result.get("cosine_to_fp32")
    cosine = f"; cosine of bf16 to fp32: median {near['median']:.6f}, least {near['min']:.6f}" if near else ""
    publish("embed", result, f"embed: {speeds} on {result['device']}{cosine}", out)


def bench_embed(
    recipe: Recipe,
    precision: Precision = "fp32",
    cells: int = 1024,
    genes: int = GENES,
    vocabulary: int = VOCABULARY,
    repeats: int = 3,
) -> dict[str, Any]:
    """Return cells per second in each precision, and how near bf16 embeddings are; arguments as those of `embed`.

    Raises ScfmError for a recipe that cannot work.
    """
    at_least_one(cells=cells, genes=genes, vocabulary=vocabulary, repeats=repeats)
    model, store = model_of(recipe, cells, genes, vocabulary)
    config, tokens_per_pack = model.files.model, recipe.data.tokens_per_pack
    if tokens_per_pack == "auto":
        raise ScfmError("data.tokens_per_pack: auto is found by training steps; give a number to embed with")
    precisions: list[Precision] = ["fp32"] if precision == "fp32" else ["fp32", "bf16"]
    speeds: dict[str, list[float]] = {name: [] for name in precisions}
    found: dict[str, NDArray[np.float32]] = {}
    for repeat in range(repeats + 1):
        for name in precisions:  # in turns, so that a machine that slows down slows both down
            start = time.perf_counter()
            found[name] = embeddings(model, store, name, tokens_per_pack)
            if repeat > 0:
                speeds[name].append(cells / (time.perf_counter() - start))
    head_width = config.width // config.heads
    result: dict[str, Any] = {"cells_per_second": {name: of_rates(values) for name, values in speeds.items()}}
    if precision == "bf16":
        cosine = (found["fp32"] * found["bf16"]).sum(1, dtype=np.float64)
        result["cosine_to_fp32"] = {"median": significant(float(np.median(cosine)), 7), "min": float(cosine.min())}
        result["speed_to_fp32"] = significant(float(np.median(np.divide(speeds["bf16"], speeds["fp32"]))))
    return result | {
        "device": device_name(model.device),
        "attention": {
            name: pick_backend(model.device, TYPES[name], head_width, config.backend)[0] for name in precisions
        },
        "weights": recipe.from_model or "fresh",
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "model": {name: getattr(config, name) for name in ("width", "heads", "layers", "hidden", "cell_embedding")},
        "cells": cells,
        "genes_per_synthetic_cell": genes,
        "max_genes": model.files.tokens.max_genes,
        "tokens_per_pack": tokens_per_pack,
        "vocabulary": len(model.files.vocabulary),
        "repeats": repeats,
    }


def model_of(recipe: Recipe, cells: int, genes: int, vocabulary: int) -> tuple[PretrainedModel, CellStore]:
    """Return the model directory of `from`, else fresh weights, and synthetic cells of its vocabulary."""
    if recipe.from_model:
        model = load(recipe.from_model)
        if model.files.value_kind != "counts":
            raise ScfmError(f"from: {recipe.from_model} reads normalised values; synthetic cells hold counts")
        known = model.files.vocabulary
        return model, replace(synthetic_store(cells, genes, known.n_genes), vocabulary=known)
    if recipe.data.gene_conditions:
        raise ScfmError("data.gene_conditions: names real genes, which synthetic cells do not have; give a model, from")
    store = synthetic_store(cells, genes, vocabulary, recipe.cell_conditions)
    job = pretraining_job(recipe, store)
    return PretrainedModel(job.network, job.files, "fresh"), store


def embeddings(
    model: PretrainedModel, store: CellStore, precision: Precision, tokens_per_pack: int
) -> NDArray[np.float32]:
    """Return the L2-normalised embedding of each cell, (N, D), as `PretrainedModel.embed` does."""
    found = np.empty((store.n_cells, model.files.model.width), np.float32)
    conditions = {name: np.zeros(store.n_cells, np.int64) for name in model.files.cell_conditions}
    for pack, output in model.outputs(model.network_at(precision), store, conditions, tokens_per_pack):
        real = pack.real_cells.cpu().numpy()
        cells = F.normalize(output.cell.float(), dim=-1).cpu().numpy()
        found[pack.cell_id.cpu().numpy()[real]] = cells[real]
    return found
