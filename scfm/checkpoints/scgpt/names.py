"""What scGPT calls scfm's tensors, and the four layouts in which its checkpoints come."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from scfm.checkpoints.native import ModelFiles
from scfm.errors import ScfmError

FLAG = "flag_encoder.weight"
GENES = "encoder.embedding.weight"


def mlp(native: str, scgpt: str) -> list[tuple[str, str]]:
    return [(f"{native}.linear1", f"{scgpt}.0"), (f"{native}.linear2", f"{scgpt}.2"), (f"{native}.out", f"{scgpt}.4")]


def classes(native: str, scgpt: str) -> list[tuple[str, str]]:
    return [
        (f"{native}.hidden.[i].0", f"{scgpt}._decoder.[3i]"),
        (f"{native}.hidden.[i].2", f"{scgpt}._decoder.[3i+2]"),
        (f"{native}.out", f"{scgpt}.out_layer"),
    ]


# Our module or tensor, and scGPT's. Ours stand under their role: a head under its kind, a condition under what it is,
# whatever a model calls them. [i] is a number in both.
NAMES: tuple[tuple[str, str], ...] = (
    ("backbone.gene_embedding.embedding", "encoder.embedding"),
    ("backbone.gene_embedding.norm", "encoder.enc_norm"),
    ("backbone.unknown_flag", FLAG),
    ("backbone.continuous_value.linear1", "value_encoder.linear1"),
    ("backbone.continuous_value.linear2", "value_encoder.linear2"),
    ("backbone.continuous_value.norm", "value_encoder.norm"),
    ("backbone.category_value.embedding", "value_encoder.embedding"),
    ("backbone.category_value.norm", "value_encoder.enc_norm"),
    ("backbone.perturbation.embedding", "pert_encoder"),
    ("backbone.batch.embedding", "batch_encoder.embedding"),
    ("backbone.batch.norm", "batch_encoder.enc_norm"),
    ("backbone.modality.embedding", "mod_encoder.embedding"),
    ("backbone.modality.norm", "mod_encoder.enc_norm"),
    ("backbone.batch_norm", "bn"),
    ("backbone.domain_norm", "dsbn.bns.[k]"),
    ("backbone.blocks.[i].qkv", "transformer_encoder.layers.[i].self_attn.Wqkv"),
    ("backbone.blocks.[i].out_proj", "transformer_encoder.layers.[i].self_attn.out_proj"),
    ("backbone.blocks.[i].linear1", "transformer_encoder.layers.[i].linear1"),
    ("backbone.blocks.[i].linear2", "transformer_encoder.layers.[i].linear2"),
    ("backbone.blocks.[i].norm1", "transformer_encoder.layers.[i].norm1"),
    ("backbone.blocks.[i].norm2", "transformer_encoder.layers.[i].norm2"),
    *mlp("heads.gep", "decoder.fc"),
    *mlp("heads.gep.nonzero", "decoder.zero_logit"),
    *mlp("heads.gep.coefficient", "decoder.coeff_decoder.fc"),
    *mlp("heads.gep.coefficient.nonzero", "decoder.coeff_decoder.zero_logit"),
    *mlp("heads.gep.bias", "decoder.bias_decoder.fc"),
    ("heads.gepc.query", "mvc_decoder.gene2query"),
    ("heads.gepc.project", "mvc_decoder.W"),
    ("heads.gepc.nonzero", "mvc_decoder.W_zero_logit"),
    ("heads.gepc.hidden", "mvc_decoder.fc1"),
    ("heads.gepc.activation", "mvc_decoder.hidden_activation"),
    ("heads.gepc.out", "mvc_decoder.fc2"),
    *classes("heads.cls", "cls_decoder"),
    *classes("heads.domain", "grad_reverse_discriminator"),
)

# Part of every perturbation model with zero probabilities, and read by nothing
UNUSED = "decoder.bias_decoder.zero_logit."

How = Literal["same", "flag", "genes", "domains"]


@dataclass(frozen=True)
class Pair:
    """A tensor of ours and what it is in a checkpoint of scGPT.

    Attributes:
        native: our name.
        scgpt: scGPT's: several where ours holds a row for each domain.
        how: `same`; `flag` (ours is row 1 of scGPT's); `genes` (rows may stand in another order); `domains` (ours
            stacks scGPT's).
        shape: of our tensor.
    """

    native: str
    scgpt: tuple[str, ...]
    how: How
    shape: tuple[int, ...]

    def scgpt_shape(self, n_rows: int) -> tuple[int, ...]:
        """Return the shape of scGPT's tensor; `n_rows` is the length of its vocabulary."""
        if self.how == "flag":
            return (2, *self.shape)
        if self.how == "genes":
            return (n_rows, *self.shape[1:])
        return self.shape[1:] if self.how == "domains" else self.shape


def pairs_of(files: ModelFiles) -> list[Pair]:
    """Return all tensors of a model, and what they are called by scGPT.

    Raises ScfmError for tensors that have no name there.
    """
    with torch.device("meta"):  # names and shapes only
        tensors = files.build().state_dict()
    roles = roles_of(files)
    nameless, pairs = [], []
    for native, tensor in tensors.items():
        name = scgpt_name(role_name(native, roles))
        if name is None:
            nameless.append(native)
        elif "[k]" in name:
            names = tuple(name.replace("[k]", str(k)) for k in range(len(tensor)))
            pairs.append(Pair(native, names, "domains", tuple(tensor.shape)))
        else:
            pairs.append(Pair(native, (name,), how(name), tuple(tensor.shape)))
    if nameless:
        raise ScfmError("scGPT has no tensors for " + ", ".join(nameless))
    return pairs


def how(scgpt: str) -> How:
    if scgpt == GENES:
        return "genes"
    if scgpt == FLAG:
        return "flag"
    # scGPT's one batch norm is a domain norm of one domain here
    return "domains" if scgpt.startswith("bn.") and scgpt.rpartition(".")[2] not in ("weight", "bias") else "same"


def roles_of(files: ModelFiles) -> dict[str, str]:
    """Return what the modules that each model names itself are: prefix -> prefix in NAMES."""
    model = files.model
    roles = {
        "backbone.value_encoder.": f"backbone.{model.value_encoder}_value.",
        "backbone.input_norm.": f"backbone.{model.input_norm}_norm.",
    }
    roles |= {f"heads.{head.task}.": f"heads.{head.kind}." for head in files.heads}
    roles |= {f"backbone.cell_conditions.{name}.": "backbone.batch." for name in model.cell_conditions}
    return roles | {f"backbone.gene_conditions.{name}.": "backbone.perturbation." for name in files.gene_conditions}


def role_name(native: str, roles: dict[str, str]) -> str:
    for prefix, role in roles.items():
        if native.startswith(prefix):
            return role + native.removeprefix(prefix)
    return native


def scgpt_name(role: str) -> str | None:
    """Translate a name that says roles into scGPT's; [k] stays where it stands for each domain. None: it has none."""
    for pattern, scgpt in PATTERNS:
        found = pattern.fullmatch(role)
        if found:
            i = int(found["i"]) if "i" in found.groupdict() else 0
            for text, number in (("[3i+2]", 3 * i + 2), ("[3i]", 3 * i), ("[i]", i)):
                scgpt = scgpt.replace(text, str(number))
            return scgpt + found["leaf"]
    return None


LEAF = r"(?P<leaf>|\.weight|\.bias|\.running_mean|\.running_var|\.num_batches_tracked)"
PATTERNS = [(re.compile(re.escape(native).replace(r"\[i\]", r"(?P<i>\d+)") + LEAF), scgpt) for native, scgpt in NAMES]


def layout_of(names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Tell the layout of a checkpoint by its names, and return each name with that of layout flash.

    flash: `self_attn.Wqkv.weight`, as published. torch: `self_attn.in_proj_weight`. 0.2.5 (that version's flash):
    `self_attn._impl.Wqkv.weight`. DDP puts `module.` before every name of any of them.

    Raises:
        ScfmError: two names mean the same tensor.
    """
    given = list(names)
    ddp = bool(given) and all(name.startswith("module.") for name in given)
    plain = {name: name.removeprefix("module.") if ddp else name for name in given}
    layout = "flash"
    if any(".self_attn.in_proj_" in name for name in plain.values()):
        layout = "torch"
    elif any(".self_attn._impl." in name for name in plain.values()):
        layout = "0.2.5"
    flash: dict[str, str] = {}
    for name, short in plain.items():
        short = short.replace(".self_attn._impl.", ".self_attn.")
        flash[name] = re.sub(r"\.self_attn\.in_proj_(weight|bias)$", r".self_attn.Wqkv.\1", short)
    twice = sorted(name for name, n in Counter(flash.values()).items() if n > 1)
    if twice:
        raise ScfmError(f"the checkpoint mixes layouts: it holds {', '.join(twice)} twice, under different names")
    return f"{layout}, DDP" if ddp else layout, flash
