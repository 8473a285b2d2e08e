"""From an scBERT checkpoint to a native model: strictly, and with nothing left behind in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scfm.checkpoints.card import converted_card
from scfm.checkpoints.drop import matching
from scfm.checkpoints.fit import Shapes, incomplete, misshapen, refuse
from scfm.checkpoints.gene_names import names_of, with_ensembl
from scfm.checkpoints.native import ModelFiles
from scfm.checkpoints.record import RECORD, changed, read_record
from scfm.checkpoints.report import Report
from scfm.checkpoints.scbert.form import Kernel, read_form
from scfm.checkpoints.scbert.names import GENES, PARTS, TABLE, Genes, Pair, layout_of, pairs_of, part_of
from scfm.checkpoints.torch_files import read_content, tensors_in, weights_file
from scfm.data.tokens import TokenConfig
from scfm.data.vocabulary import SPECIALS, Gene, Vocabulary
from scfm.data.vocabulary_files import lines_of, read_text, read_vocabulary
from scfm.errors import ScfmError

State = Mapping[str, Tensor]

WRAPPED = "model_state_dict"
GENE_LIST = "genes.txt"
MASK_RATIO, MASK_KEPT = 0.15, 0.1
UPSTREAM = ".proj_updater."


@dataclass
class Checkpoint:
    """What a file of scBERT holds.

    Attributes:
        state: tensors by name, without the prefix of DDP.
        ddp: whether names had it.
        others: what stands beside the tensors, by name.
    """

    state: dict[str, Tensor]
    ddp: bool
    others: dict[str, Any]


def is_scbert(content: Any) -> bool:
    """Say whether the content of a file is a checkpoint of scBERT, by its names."""
    state = content.get(WRAPPED, content) if isinstance(content, Mapping) else {}
    return isinstance(state, Mapping) and any(str(n).removeprefix("module.").startswith("performer.") for n in state)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file. Raises ScfmError where it is damaged, asks for code to be executed, or holds no tensors by name."""
    content = read_content(path)
    others = {}
    if isinstance(content, Mapping) and isinstance(content.get(WRAPPED), Mapping):
        others = {str(name): value for name, value in content.items() if name != WRAPPED}
        content = content[WRAPPED]
    state = tensors_in(content, path)
    ddp = all(name.startswith("module.") for name in state)
    return Checkpoint({name.removeprefix("module.") if ddp else name: t for name, t in state.items()}, ddp, others)


def read_scbert(
    source: Path | str,
    *,
    vocabulary: Path | str | None = None,
    drop: Sequence[str] = (),
    labels: Sequence[str] | None = None,
    ensembl_of: Mapping[str, str] | None = None,
    kernel: Kernel = "exp",
) -> tuple[ModelFiles, dict[str, Tensor], Report]:
    """Read an scBERT checkpoint.

    A folder that scfm exported is read back as the model it was exported from; options for what scBERT's file does not
    tell then have no place.

    Args:
        source: the .pth file, or a folder with it alone.
        vocabulary: names of the genes in the order of the checkpoint: a text file with one per line, or a vocab.json.
        drop: patterns of tensors to leave behind, by their names without `module.`.
        labels: names of the classes of a fine-tuned model.
        ensembl_of: symbol -> Ensembl id of genes.
        kernel: of the features: `exp`, `relu` or `gelu` (generalized attention), or `none` (no_projection).

    Returns:
        What describes the model, its weights by native name, and what was done.

    Raises:
        ScfmError: a file cannot be read, or the tensors are not those of such a model.
    """
    weights = weights_file(Path(source))
    checkpoint = read_checkpoint(weights)
    if (weights.parent / RECORD).is_file():
        if any([vocabulary, labels, drop, ensembl_of]) or kernel != "exp":
            raise ScfmError(
                f"{weights.parent / RECORD}: says what scfm exported here, so no option is needed; to read the folder "
                "as scBERT's alone, remove this file"
            )
        return read_back(checkpoint.state, weights)
    if vocabulary is None:
        raise ScfmError(
            f"{weights}: scBERT's files hold no gene names; give them with --vocabulary, a text file with one symbol "
            "per line in the order of the columns that the model was trained on"
        )
    names = read_vocabulary(Path(vocabulary))
    genes = Vocabulary([*names.entries[: names.n_genes], *map(Gene, SPECIALS)])
    files, native, report = to_native(
        checkpoint.state,
        with_ensembl(genes, ensembl_of or {}),
        drop=drop,
        labels=labels,
        kernel=kernel,
        source=weights.name,
    )
    converted = files.training_data["converted"]
    if checkpoint.ddp:
        report.layout = converted["layout"] = f"{report.layout}, DDP"
    numbers = {name: value for name, value in checkpoint.others.items() if isinstance(value, int | float)}
    left = [name for name in checkpoint.others if name not in numbers]
    report.left_behind += left
    converted |= {"left_behind": report.left_behind, "beside": numbers}  # the epoch, the loss
    files.card = converted_card(files, report)
    return files, native, report


def to_native(
    state: State,
    vocabulary: Vocabulary,
    *,
    drop: Sequence[str] = (),
    labels: Sequence[str] | None = None,
    kernel: Kernel = "exp",
    source: str = "the checkpoint",
) -> tuple[ModelFiles, dict[str, Tensor], Report]:
    """Convert tensors under scBERT's names.

    Args:
        state: tensors by name, without the prefix of DDP.
        vocabulary: the genes in scBERT's order.
        drop, labels, kernel: as for `read_scbert`.
        source: named in errors, and in the model as the place that its gene vectors come from.

    Raises:
        ScfmError: lists every missing, unexpected and mis-shaped tensor.
    """
    if not any(part_of(name) == "performer" for name in state):
        named = ", ".join(list(state)[:3])
        raise ScfmError(f"{source}: is no checkpoint of scBERT: no tensor is performer.*; there are {named} ...")
    dropped = matching(drop, state, source)
    kept = {name: tensor for name, tensor in state.items() if name not in dropped}
    shapes = {name: tuple(tensor.shape) for name, tensor in kept.items()}
    try:
        headless = "to_out" in map(part_of, dropped) and "to_out" not in map(part_of, kept)
        form = read_form(shapes, labels, kernel, source, headless=headless)
        tokens = tokens_of(form.n_bins, vocabulary)
    except ScfmError as error:
        raise ScfmError(f"{source}: {error}") from error
    files = ModelFiles(form.model, tokens, "counts", vocabulary, form.heads)
    genes = Genes(vocabulary, range(vocabulary.n_genes))
    pairs = [pair for pair in pairs_of(files) if GENES in kept or pair.theirs != (GENES,)]
    check(shapes, pairs, vocabulary, source)
    notes = form.notes + rounding(kept)
    weights = native_tensors(pairs, kept, files, genes)
    files.training_data = {
        "converted": {
            "from": "scBERT",
            "file": source,
            "layout": layout_of(files),
            "left_behind": dropped,
            "gene_table": str(kept[GENES].dtype).removeprefix("torch.") if GENES in kept else None,
        }
    }
    return files, weights, Report(layout_of(files), parts_of(kept), numbers_in(kept), list(dropped), notes)


def native_tensors(pairs: Sequence[Pair], state: State, files: ModelFiles, genes: Genes) -> dict[str, Tensor]:
    """Return our tensors by name, as float32; a gene table that scBERT lacks is zeros."""
    exact = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    weights = {pair.native: pair.to_native(exact, genes) for pair in pairs}
    if TABLE not in weights:
        weights[TABLE] = torch.zeros(len(files.vocabulary), files.model.width)
    return weights


def tokens_of(n_bins: int, vocabulary: Vocabulary) -> TokenConfig:
    """Return how scBERT's cells become tokens."""
    return TokenConfig(
        genes="all",
        max_genes=vocabulary.n_genes,
        values="log2",
        n_bins=n_bins,
        mask_ratios=(MASK_RATIO,),
        mask_candidates="expressed",
        mask_kept=MASK_KEPT,
        cls_value=0.0,
        mask_value=float(n_bins),
    )


def check(shapes: Shapes, pairs: Sequence[Pair], vocabulary: Vocabulary, source: str) -> None:
    """Raise ScfmError that lists every missing, unexpected and mis-shaped tensor, with the reason."""
    expected = {name: pair.their_shape for pair in pairs for name in pair.theirs}
    names = f"{vocabulary.n_genes} names of genes, and one position for the empty token at the end of a cell"
    groups = incomplete(shapes, expected, part_of, why_unexpected)
    reason = "is it another model, or another list of genes?"
    groups += misshapen(shapes, expected, reason, dict.fromkeys((GENES, "to_out.fc1.weight"), names))
    refuse(groups, f"{source}: the tensors are not those of a model of scBERT:")


def why_unexpected(part: str | None, names: Sequence[str]) -> str:
    if any(UPSTREAM in name for name in names):
        return "written by the package performer-pytorch, whose features and positions are others than scBERT's"
    return f"scBERT's {part} has no such tensors" if part else "scBERT has no such part"


def rounding(state: State) -> list[str]:
    """Return in words which tensors become float32, and whether that changes their values."""
    notes = []
    others: Counter[str] = Counter()
    for name, tensor in state.items():
        if name == GENES and tensor.element_size() == 8:
            change = float((tensor - tensor.float().double()).abs().max())
            lost = f"rounded to it by at most {change:.1e}" if change else "which holds its values exactly"
            notes.append(f"{name} is float64 in scBERT and float32 here, {lost}")
        elif tensor.is_floating_point() and tensor.element_size() != 4:
            others[str(tensor.dtype)] += 1
    return notes + [f"{n} tensors of {kind} became float32" for kind, n in others.items()]


def read_back(state: State, file: Path) -> tuple[ModelFiles, dict[str, Tensor], Report]:
    """Return the model that scfm exported into the folder of this file of weights."""
    record = read_record(file.parent, file)
    files = record.files
    names, listed = names_of(files.vocabulary), file.parent / GENE_LIST
    if lines_of(read_text(listed)) != [names[i] for i in record.native_of]:
        raise changed(listed)
    pairs = [pair for pair in pairs_of(files) if pair.theirs[0] in state or pair.theirs != (GENES,)]
    weights = native_tensors(pairs, state, files, Genes(files.vocabulary, record.native_of))
    for entry, row in record.kept.items():
        weights[TABLE][int(entry)] = torch.tensor(row)
    notes = [f"{RECORD} says what scfm exported here: this is that model again"]
    return files, weights, Report(layout_of(files), parts_of(state), numbers_in(state), record.added, notes)


def parts_of(state: Collection[str]) -> dict[str, int]:
    found = Counter(map(part_of, state))
    return {part: found[part] for part in PARTS if part in found}


def numbers_in(state: State) -> int:
    return sum(tensor.numel() for tensor in state.values())
