"""Folders as scGPT saves its models, made of stored cases of the original, for tests of the converter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from scgpt_cases import VOCABULARY, args_of
from torch import Tensor

TOKENS = [entry.id for entry in VOCABULARY.entries]


def case_parts(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a stored case, and an args.json that announces them."""
    sizes = json.loads((folder / "config.json").read_text())["constructor"]
    return load_file(folder / "state_dict.safetensors"), args_of(sizes)


def write_folder(
    folder: Path, state: Mapping[str, Any], args: Mapping[str, Any], tokens: Mapping[str, int] | None = None
) -> Path:
    """Write best_model.pt, args.json and vocab.json."""
    folder.mkdir()
    torch.save(dict(state), folder / "best_model.pt")
    (folder / "args.json").write_text(json.dumps(args))
    ids = tokens or {token: i for i, token in enumerate(TOKENS)}
    (folder / "vocab.json").write_text(json.dumps(ids))
    return folder


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Say whether tensors are the same, bit by bit."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )
