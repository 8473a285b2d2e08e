"""How an imported scGPT model reads cells: as scGPT's zero-shot embedding or as its fine-tuning code does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from scfm.checkpoints.scgpt.form import MODALITIES, Form
from scfm.data.store import ValueKind
from scfm.data.tokens import TokenConfig
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.errors import ScfmError

Preset = Literal["zero_shot", "finetuned"]
N_BINS = 51  # fixed in scGPT's collator
ZERO_SHOT_TOKENS = 1200  # default of scGPT's embed_data, <cls> included


def token_config(form: Form, args: Mapping[str, Any], preset: Preset) -> tuple[TokenConfig, ValueKind]:
    """Return how cells become tokens, and the kind of values that are expected; what is assumed joins the notes.

    `zero_shot` reads cells as scGPT's embed_data does: `<cls>` has the value of padding, 1,200 tokens. `finetuned`
    reads them as its fine-tuning scripts do: `<cls>` has the value 0, args.json says how many tokens.
    """
    if "n_bins" not in args:
        form.notes.append(f"args.json has no n_bins; {N_BINS}, as scGPT's collator always takes")
    tokens = ZERO_SHOT_TOKENS
    if preset == "finetuned":
        if not isinstance(args.get("max_seq_len"), int):
            raise ScfmError("args.json has no max_seq_len, which the preset finetuned needs; add it, or use zero_shot")
        tokens = args["max_seq_len"]
    ratios = args.get("mask_ratio", 0.0)
    mask, pad = args.get("mask_value"), args.get("pad_value")
    options: dict[str, Any] = {
        "max_genes": tokens - 1,
        "n_bins": args.get("n_bins", N_BINS),
        "mask_ratios": tuple(float(ratio) for ratio in (ratios if isinstance(ratios, list) else [ratios])),
        "mask_value": float(mask) if isinstance(mask, int | float) else -1.0,
        "cls_value": 0.0 if preset == "finetuned" else float(pad) if isinstance(pad, int | float) else -2.0,
    }
    if "perturbation" in form.gene_conditions:
        form.notes.append(
            "scGPT's perturbation scripts give their cells no <cls>, scfm always gives one; values are log-normalised"
        )
        return TokenConfig(**options, genes="all", values="raw"), "normalised"
    return TokenConfig(**options), "counts"


def gene_tables(form: Form, vocabulary: Vocabulary) -> dict[str, list[int]]:
    """Return the index of each vocabulary entry in each gene condition: modality by name, nothing perturbed."""
    tables = {name: [0] * len(vocabulary) for name in form.gene_conditions}
    if form.gene_conditions.get("modality") == MODALITIES:
        tables["modality"] = [modality_of(gene) for gene in vocabulary.entries]
    return tables


def modality_of(gene: Gene) -> int:
    """Return the modality of a gene or special token, as scGPT's multi-omic tutorial names them: p_ for proteins."""
    if gene.id in MODALITIES:
        return MODALITIES.index(gene.id)
    return MODALITIES.index("Protein" if (gene.symbol or gene.id).startswith("p_") else "RNA")
