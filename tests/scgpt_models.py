"""Native models of every form that scGPT can hold, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scfm.checkpoints.native import ModelFiles
from scfm.data.tokens import TokenConfig
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.model.heads import HeadSpec
from scfm.recipe import ModelConfig

GEP, GEPC = HeadSpec("gep", "gep"), HeadSpec("gepc", "gepc")
CLS = HeadSpec("annotation", "cls", 4, ["A", "B", "C", "D"], layers=2)
BATCHES = {"donor": ["one", "two", "three"]}
MODALITIES = {"modality": ["Protein", "RNA", "<pad>", "<cls>", "<eoc>"]}
PERTURBED = {"perturbation": ["none", "perturbed", "padding"]}
DAR = HeadSpec("dar", "domain", 3, BATCHES["donor"])


def both(**options: Any) -> list[HeadSpec]:
    return [HeadSpec("gep", "gep", nonzero=True), HeadSpec("gepc", "gepc", nonzero=True, **options)]


# name -> model section, heads, cell conditions, gene conditions
FORMS: dict[str, tuple[dict[str, Any], list[HeadSpec], dict[str, list[str]], dict[str, list[str]]]] = {
    "full": ({}, [GEP, GEPC, CLS], {}, {}),
    "generative": ({"attention": "generative"}, [GEP, GEPC], {}, {}),
    "detached": ({}, [GEP, HeadSpec("gepc", "gepc", query="detached product")], {}, {}),
    "batches": (
        {"cell_conditions": ["donor"], "input_norm": "domain", "domain": "donor"},
        [*both(), CLS, DAR],
        BATCHES,
        {},
    ),
    "domains": ({"input_norm": "domain", "domain": "donor"}, [GEP], BATCHES, {}),
    "batch norm": ({"input_norm": "batch"}, [GEP, GEPC], {}, {}),
    "category": ({"value_encoder": "category"}, [GEP, GEPC], {}, {}),
    "scaling": ({"value_encoder": "scaling"}, [GEP, GEPC], {}, {}),
    "modality": (
        {"modality": "modality", "cell_conditions": ["donor"]},
        [*both(query_reads_conditions=True), CLS],
        BATCHES,
        MODALITIES,
    ),
    "perturbation": (
        {},
        [HeadSpec("gep", "gep", affine=True, activation="Softplus", adaptive_bias=True), GEPC],
        {},
        PERTURBED,
    ),
}


def a_model(form: str, **model: Any) -> tuple[ModelFiles, dict[str, Tensor]]:
    """Return a model and its weights; no weight is 0 or 1 as it is at the start of a training."""
    options, heads, cell, gene = FORMS[form]
    named = [Gene.of(f"ENSG{i:011d}", f"G{i:02}") for i in range(18)] + [Gene.of(None, "G18"), Gene.of(None, "TP53")]
    vocabulary = Vocabulary([*named, Gene("<pad>"), Gene("<cls>")])
    sizes = {"width": 16, "heads": 2, "layers": 2, "hidden": 24, "attention": "full"}
    files = ModelFiles(
        model=ModelConfig(**(sizes | options | model)),
        tokens=TokenConfig(max_genes=30, n_bins=11, mask_ratios=(0.25, 0.5)),
        value_kind="counts",
        vocabulary=vocabulary,
        heads=heads,
        cell_conditions=cell,
        gene_conditions=gene,
        gene_tables={name: [1] * 20 + [2, 3] if name == "modality" else [0] * 22 for name in gene},
        training_data={"stage": "pretraining"},
        card="# a card",
    )
    torch.manual_seed(0)
    weights = files.build().state_dict()
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            tensor.add_(0.3 * torch.randn_like(tensor))
            if name.endswith("running_var"):
                tensor.abs_()
        else:
            tensor += torch.arange(tensor.numel()).view(tensor.shape) + 7
    return files, weights
