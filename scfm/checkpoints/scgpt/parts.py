"""The parts that an scGPT model may have or lack, and what its args.json announces of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from scfm.errors import ScfmError


@dataclass(frozen=True)
class Part:
    """A part of scGPT's model.

    Attributes:
        name: as the option `--allow` takes it.
        tensors: patterns of its tensors' names.
        announced_by: keys of args.json that announce it, by any of the names that scGPT's scripts use; none: every
            model has it.
        hint: what is worth knowing where it is not as announced.
    """

    name: str
    tensors: tuple[str, ...]
    announced_by: tuple[str, ...] = ()
    hint: str = ""


# A tensor belongs to the first part that it matches
PARTS = (
    Part("encoder", ("encoder.*",)),
    Part("transformer", ("transformer_encoder.*",)),
    Part("value_encoder", ("value_encoder.*",), ("input_emb_style",)),
    Part(
        "flag_encoder",
        ("flag_encoder.*",),
        ("USE_GENERATIVE_TRAINING", "use_generative_training"),
        "with it attention is generative, without it full; fine-tuned models lack it",
    ),
    Part("batch_encoder", ("batch_encoder.*",), ("use_batch_labels", "use_batch_label", "INPUT_BATCH_LABELS")),
    Part("modality", ("mod_encoder.*",), ("use_mod",)),
    Part(
        "input_norm",
        ("bn.*", "dsbn.*"),
        ("domain_spec_batchnorm", "DSBN"),
        "fine-tunes from before September 2023 carry bn.*, which newer scGPT drops silently though outputs change",
    ),
    Part(
        "zero_prob",
        ("decoder.zero_logit.*", "decoder.*_decoder.zero_logit.*", "mvc_decoder.W_zero_logit.*"),
        ("explicit_zero_prob",),
    ),
    Part("perturbation", ("pert_encoder.*", "decoder.coeff_decoder.*", "decoder.bias_decoder.*"), ("pert_pad_id",)),
    Part("decoder", ("decoder.*",)),
    Part("mvc_decoder", ("mvc_decoder.*",), ("MVC", "do_mvc", "GEPC")),
    Part("cls_decoder", ("cls_decoder.*",), ("USE_CLS", "CLS", "no_cls"), "models that learned no classes lack it"),
    Part("dab", ("grad_reverse_discriminator.*",), ("do_dab", "DAB", "DAR")),
)
REQUIRED = ("encoder", "transformer")


def part_of(name: str) -> str | None:
    """Return the part that a tensor belongs to, None for one that scGPT does not have."""
    return next((part.name for part in PARTS if any(fnmatchcase(name, pattern) for pattern in part.tensors)), None)


def check_allowed(allow: Sequence[str]) -> None:
    """Raise ScfmError for a name that is no part, or a part that no model can be without."""
    known = [part.name for part in PARTS if part.name not in REQUIRED]
    for name in allow:
        if name not in known:
            raise ScfmError(f"--allow {name}: there is no such part; choose from {', '.join(known)}")


def announced(args: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, bool | None]:
    """Return for every part whether args.json announces it; None where a model may have it or not."""
    says: dict[str, bool | None] = {}
    for part in PARTS:
        says[part.name] = any(bool(args.get(key)) for key in part.announced_by) if part.announced_by else True
    says["value_encoder"] = args.get("input_emb_style") != "scaling"
    says["input_norm"] = args.get("domain_spec_batchnorm") in (True, "dsbn", "batchnorm") or bool(args.get("DSBN"))
    says["perturbation"] = "pert_pad_id" in args
    # the perturbation model's decoder is a part of its own
    affine = says["perturbation"] or any(part_of(name) == "perturbation" for name in shapes)
    says["decoder"] = None if affine else True
    # scGPT builds a class decoder of one class for models without classes (0.2.4), or none at all (pretraining)
    outputs = shapes.get("cls_decoder.out_layer.weight", (0,))[0]
    learns = bool(args.get("USE_CLS") or args.get("CLS")) or args.get("no_cls") is False
    says["cls_decoder"] = None if outputs == 1 or args.get("n_cls") == 1 else learns
    return says


def said_by(part: Part, args: Mapping[str, Any]) -> str:
    """Return in words what args.json says of a part."""
    if not part.announced_by:
        return "every model of scGPT has it"
    said = [f"{key} {args[key]!r}" for key in part.announced_by if key in args]
    return f"args.json says {', '.join(said)}" if said else f"args.json has no {' or '.join(part.announced_by)}"
