"""From a native model to a folder that scGPT loads, and from which scfm gets the same model back."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scfm.checkpoints.drop import without
from scfm.checkpoints.native import ModelFiles
from scfm.checkpoints.record import Record, write_record
from scfm.checkpoints.report import Report
from scfm.checkpoints.scgpt.args import args_of
from scfm.checkpoints.scgpt.limits import check, notes, scgpt_class
from scfm.checkpoints.scgpt.names import FLAG, UNUSED, Pair, pairs_of
from scfm.checkpoints.scgpt.parts import part_of
from scfm.checkpoints.scgpt.tokens import EOC, Tokens, write_tokens
from scfm.errors import ScfmError


@dataclass
class Export:
    """A model as scGPT keeps it.

    Attributes:
        state: tensors under scGPT's names, layout flash.
        args: content of args.json.
        tokens: scGPT's tokens, by row of the gene embedding.
        record: what scGPT has no place for.
        report: what was done.
    """

    state: dict[str, Tensor]
    args: dict[str, Any]
    tokens: Tokens
    record: Record
    report: Report


def to_scgpt(files: ModelFiles, weights: Mapping[str, Tensor], drop: Sequence[str] = ()) -> Export:
    """Convert a native model.

    Args:
        files: what describes it.
        weights: its tensors by native name.
        drop: patterns of tensors to leave behind: whole heads.

    Raises:
        ScfmError: lists all of the model that scGPT has no place for.
    """
    heads, dropped = without(files, drop, list(weights))
    files = replace(files, heads=heads)
    check(files)
    converted = files.training_data.get("converted")
    tokens = tokens_of(files, converted)
    pairs = pairs_of(files)
    state: dict[str, Tensor] = {}
    for pair in pairs:
        state |= scgpt_tensors(pair, weights[pair.native], tokens, converted or {})
    added = add_unread(state, files, converted)
    state = {name: plain_tensor(tensor) for name, tensor in state.items()}
    said = notes(files)
    if EOC not in tokens.names:
        said.append("the vocabulary has no <eoc>: scGPT's loaders add it and then skip the gene embedding in silence")
    report = Report(
        layout="flash",
        parts=dict(Counter(part_of(name) or "unknown" for name in state)),
        n_parameters=sum(tensor.numel() for tensor in state.values()),
        left_behind=dropped,
        notes=said,
    )
    return Export(state, args_of(files), tokens, Record(files, tokens.native_of, added), report)


def tokens_of(files: ModelFiles, converted: Mapping[str, Any] | None) -> Tokens:
    """Return the rows of scGPT's embedding: as they were where the model came from scGPT, else ours and `<eoc>`."""
    if converted is not None:
        rows = converted["rows"]
        return Tokens.same_order(files.vocabulary) if rows is None else Tokens(files.vocabulary, rows)
    rows = list(range(len(files.vocabulary)))
    has_eoc = any(gene.id == EOC for gene in files.vocabulary.entries)
    return Tokens(files.vocabulary, rows if has_eoc else [*rows, -1])


def scgpt_tensors(pair: Pair, tensor: Tensor, tokens: Tokens, converted: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return scGPT's tensors, by name, from one of ours."""
    if pair.how == "domains":
        return dict(zip(pair.scgpt, tensor.unbind(0), strict=True))
    (name,) = pair.scgpt
    if pair.how == "flag":
        row = converted.get("flag_row")
        return {name: torch.stack([torch.zeros_like(tensor) if row is None else tensor.new_tensor(row), tensor])}
    if pair.how == "genes":
        return {name: tokens.to_scgpt(tensor)}
    if name == "value_encoder.embedding.weight" and "padding_row" in converted:
        tensor = tensor.clone()
        tensor[-2] = tensor.new_tensor(converted["padding_row"])
    return {name: tensor}


def plain_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor as float32 where it is a float, and alone in its memory, as torch.save writes all of that."""
    tensor = (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def add_unread(state: dict[str, Tensor], files: ModelFiles, converted: Mapping[str, Any] | None) -> list[str]:
    """Add tensors that scGPT's classes have and its computations do not read; return their names."""
    added = {}
    kind = scgpt_class(files)
    if kind == "TransformerModel" and FLAG not in state and converted is None:
        added[FLAG] = torch.zeros(2, files.model.width)
    if kind == "TransformerGenerator":
        used = "decoder.coeff_decoder.zero_logit."
        added |= {UNUSED + name.removeprefix(used): state[name] for name in state if name.startswith(used)}
    state |= added
    return list(added)


def write_scgpt(folder: Path, export: Export) -> None:
    """Write args.json, vocab.json, best_model.pt and scfm.json under a temporary name, then rename the folder.

    Raises:
        ScfmError: the folder holds anything.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ScfmError(f"{folder}: is not empty; choose another directory")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "args.json").write_text(json.dumps(export.args, indent=1), encoding="utf-8")
    write_tokens(partial / "vocab.json", export.tokens)
    weights = partial / "best_model.pt"
    torch.save(export.state, weights)
    write_record(partial, export.record, weights)
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
