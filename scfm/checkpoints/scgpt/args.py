"""args.json: read, and written by the keys that scGPT's own code and scripts read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scfm.checkpoints.native import ModelFiles
from scfm.checkpoints.scgpt.form import POOLING, QUERIES, SIZES
from scfm.checkpoints.scgpt.limits import PERTURBATION
from scfm.checkpoints.scgpt.parts import PARTS
from scfm.errors import ScfmError
from scfm.model.heads import HeadSpec

STYLES = {query: style for style, query in QUERIES.items()}
PAD_VALUE = -2
ROW_OF_PERTURBATION_PADDING = 0  # condition 0 adds nothing here, and is not trained


def read_args(path: Path) -> dict[str, Any]:
    """Return the content of args.json. Raises ScfmError where it is missing or no JSON object."""
    try:
        args = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ScfmError(f"{path}: there is no such file; name the args.json of the model with --args") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ScfmError(f"{path}: is not JSON ({error})") from error
    if not isinstance(args, dict):
        raise ScfmError(f"{path}: holds a {type(args).__name__}; expected an object of settings")
    return args


def args_of(files: ModelFiles) -> dict[str, Any]:
    """Return args.json; what a former checkpoint's said of other matters is kept."""
    model, tokens = files.model, files.tokens
    heads: dict[str, HeadSpec] = {head.kind: head for head in files.heads}
    gep, gepc, classes = heads.get("gep"), heads.get("gepc"), heads.get("cls")
    former = files.training_data.get("converted", {}).get("args", {})
    told = {key for part in PARTS for key in part.announced_by} | {key for keys in SIZES.values() for key in keys}
    category = model.value_encoder == "category"
    args: dict[str, Any] = {key: value for key, value in former.items() if key not in told}
    args |= {
        "embsize": model.width,
        "nheads": model.heads,
        "nlayers": model.layers,
        "d_hid": model.hidden,
        "n_layers_cls": classes.layers if classes else 3,
        "n_cls": classes.n_out if classes else 1,
        "dropout": model.dropout,
        "pre_norm": model.norm == "pre",
        "fast_transformer": True,
        "pad_token": "<pad>",
        "pad_value": former.get("pad_value", tokens.n_bins if category else PAD_VALUE),
        "mask_value": plain(tokens.mask_value),
        "mask_ratio": list(tokens.mask_ratios),
        "max_seq_len": tokens.max_genes + 1,
        "n_bins": tokens.n_bins,
        "input_style": "binned",
        "input_emb_style": model.value_encoder,
        "cell_emb_style": next(style for style, kind in POOLING.items() if kind == model.cell_embedding),
        "MVC": gepc is not None,
        "mvc_decoder_style": next(
            style for style, query in QUERIES.items() if query == (gepc.query if gepc else "product")
        ),
        "explicit_zero_prob": any(head.nonzero for head in files.heads),
        "USE_CLS": classes is not None,
        "no_cls": classes is None,
        "USE_GENERATIVE_TRAINING": model.attention == "generative",
        "use_batch_labels": bool(model.cell_conditions),
        "num_batch_labels": n_batches(files),
        "domain_spec_batchnorm": {"none": False, "batch": "batchnorm", "domain": True}[model.input_norm],
        "do_dab": "domain" in heads,
        "use_mod": model.modality is not None,
    }
    if category:
        args["n_input_bins"] = tokens.n_bins + 2
    if model.modality:
        args["ntokens_mod"] = len(files.gene_conditions[model.modality])
    if PERTURBATION in files.gene_conditions:
        args |= {
            "pert_pad_id": former.get("pert_pad_id", ROW_OF_PERTURBATION_PADDING),
            "decoder_activation": gep.activation if gep else None,
            "decoder_adaptive_bias": bool(gep and gep.adaptive_bias),
        }
    return args


def n_batches(files: ModelFiles) -> int | None:
    """Return how many batches the model tells, None where it tells none."""
    condition = next(iter([*files.model.cell_conditions, *([files.model.domain] if files.model.domain else [])]), None)
    if condition is not None:
        return len(files.cell_conditions[condition])
    return next((head.n_out for head in files.heads if head.kind == "domain"), None)


def plain(value: float) -> float | int:
    return int(value) if value == int(value) else value
