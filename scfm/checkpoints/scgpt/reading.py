"""From an scGPT checkpoint to a native model: strictly, and with nothing left behind in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scfm.checkpoints.card import converted_card
from scfm.checkpoints.drop import matching
from scfm.checkpoints.native import ModelFiles, read_json
from scfm.checkpoints.record import RECORD, changed, read_record
from scfm.checkpoints.report import Report
from scfm.checkpoints.scgpt.args import read_args
from scfm.checkpoints.scgpt.form import FormReader
from scfm.checkpoints.scgpt.names import FLAG, GENES, UNUSED, Pair, layout_of, pairs_of
from scfm.checkpoints.scgpt.parts import announced, check_allowed, part_of
from scfm.checkpoints.scgpt.settings import Preset, gene_tables, token_config
from scfm.checkpoints.scgpt.strict import check
from scfm.checkpoints.scgpt.tokens import Tokens, read_tokens
from scfm.checkpoints.torch_files import read_state, weights_file
from scfm.data.vocabulary import Vocabulary
from scfm.errors import ScfmError

State = Mapping[str, Tensor]


def read_scgpt(
    source: Path | str,
    *,
    args: Path | str | None = None,
    vocabulary: Path | str | None = None,
    preset: Preset = "zero_shot",
    allow: Sequence[str] = (),
    drop: Sequence[str] = (),
    labels: Sequence[str] | None = None,
    batches: Sequence[str] | None = None,
    ensembl_of: Mapping[str, str] | None = None,
) -> tuple[ModelFiles, dict[str, Tensor], Report]:
    """Read an scGPT checkpoint.

    A folder that scfm exported is read back as the model it was exported from; options for what scGPT's files do not
    tell then have no place.

    Args:
        source: folder with args.json, vocab.json and weights, or the file with the weights.
        args: args.json, if it is not beside the weights.
        vocabulary: vocab.json, or a text file with a token per line, if it is not beside the weights.
        preset: `zero_shot` or `finetuned`: how cells become tokens.
        allow: parts for which the tensors are right, whatever args.json says.
        drop: patterns of tensors to leave behind, by their names in layout flash.
        labels: names of the classes.
        batches: names of the batches.
        ensembl_of: symbol -> Ensembl id of genes.

    Returns:
        What describes the model, its weights by native name, and what was done.

    Raises:
        ScfmError: a file cannot be read, or the tensors are not what args.json announces.
    """
    weights = weights_file(Path(source))
    folder = weights.parent
    state = read_state(weights)
    exact = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    if (folder / RECORD).is_file():
        if any([args, vocabulary, labels, batches, allow, drop, ensembl_of]) or preset != "zero_shot":
            raise ScfmError(
                f"{folder / RECORD}: says what scfm exported here, so no option is needed; to read the folder as "
                "scGPT's alone, remove this file"
            )
        return read_back(exact, weights)
    said = read_args(Path(args) if args else folder / "args.json")
    listed = Path(vocabulary) if vocabulary else folder / "vocab.json"
    _, names = layout_of(state)
    rows = [tensor.shape[0] for name, tensor in state.items() if names[name] == GENES and tensor.ndim == 2]
    tokens = read_tokens(listed, rows[0] if rows else 0, ensembl_of)
    files, native, report = to_native(
        exact,
        said,
        tokens,
        preset=preset,
        allow=allow,
        drop=drop,
        labels=labels,
        batches=batches,
        source=str(source),
    )
    other = Counter(str(tensor.dtype) for name, tensor in state.items() if exact[name] is not tensor)
    report.notes += [f"{n} tensors of {kind} became float32" for kind, n in other.items()]
    files.training_data["converted"]["file"] = weights.name
    files.card = converted_card(files, report)
    return files, native, report


def to_native(
    state: State,
    args: Mapping[str, Any],
    vocabulary: Tokens | Vocabulary,
    *,
    preset: Preset = "zero_shot",
    allow: Sequence[str] = (),
    drop: Sequence[str] = (),
    labels: Sequence[str] | None = None,
    batches: Sequence[str] | None = None,
    source: str = "the checkpoint",
) -> tuple[ModelFiles, dict[str, Tensor], Report]:
    """Convert tensors under scGPT's names, in any layout; they keep their dtype.

    Args:
        state: tensors by name.
        args: settings by the keys of args.json (or of the constructors of scGPT's models).
        vocabulary: scGPT's tokens; a Vocabulary where the rows of the gene embedding stand in its order.
        preset, allow, drop, labels, batches: as for `read_scgpt`.
        source: named in errors.

    Raises:
        ScfmError: lists every missing, unexpected and mis-shaped tensor.
    """
    check_allowed(allow)
    tokens = vocabulary if isinstance(vocabulary, Tokens) else Tokens.same_order(vocabulary)
    layout, names = layout_of(state)
    tensors = {names[name]: tensor for name, tensor in state.items()}
    dropped = matching(drop, tensors, source)
    unused = [name for name in tensors if name.startswith(UNUSED) and name not in dropped]
    kept = {name: tensor for name, tensor in tensors.items() if name not in {*dropped, *unused}}

    shapes = {name: tuple(tensor.shape) for name, tensor in kept.items()}
    form = FormReader(shapes, args, layout).read(labels, batches)
    config, value_kind = token_config(form, args, preset)
    files = ModelFiles(
        model=form.model,
        tokens=config,
        value_kind=value_kind,
        vocabulary=tokens.vocabulary,
        heads=form.heads,
        cell_conditions=form.cell_conditions,
        gene_conditions=form.gene_conditions,
        gene_tables=gene_tables(form, tokens.vocabulary),
    )
    pairs = pairs_of(files)
    says = announced(args, shapes)
    n_tokens = len(tokens.native_of)
    check(shapes, pairs, form, args, says, n_tokens=n_tokens, dropped=dropped, allow=allow, source=source)

    weights = {pair.native: native_tensor(pair, kept, tokens) for pair in pairs}
    converted: dict[str, Any] = {
        "from": "scGPT",
        "layout": layout,
        "preset": preset,
        "args": dict(args),
        "rows": None if tokens.is_same_order else tokens.native_of,
        "left_behind": [*dropped, *unused],
        "flag_row": kept[FLAG][0].tolist() if FLAG in kept else None,
    }
    if form.model.value_encoder == "category" and preset == "finetuned":
        converted["padding_row"] = own_cls_value(weights, config.n_bins)
        form.notes.append("<cls> has the value embedding of bin 0, as in scGPT's fine-tuning")
    if unused:
        form.notes.append(f"{UNUSED}* is read by nothing in scGPT and was left behind")
    files.training_data = {"converted": converted}
    report = Report(
        layout=layout,
        parts=parts_of(kept),
        n_parameters=numbers_in(kept),
        left_behind=converted["left_behind"],
        notes=form.notes,
    )
    return files, weights, report


def native_tensor(pair: Pair, state: State, tokens: Tokens) -> Tensor:
    """Return our tensor from scGPT's."""
    tensors = [state[name] for name in pair.scgpt]
    if pair.how == "domains":
        return torch.stack(tensors)
    if pair.how == "flag":
        return tensors[0][1]
    return tokens.to_native(tensors[0]) if pair.how == "genes" else tensors[0]


def own_cls_value(weights: dict[str, Tensor], n_bins: int) -> list[float]:
    """Give `<cls>` the value embedding of bin 0, and return what stood there: that of padding, which scfm has not."""
    name = "backbone.value_encoder.embedding.weight"
    table = weights[name].clone()
    padding = table[n_bins].tolist()
    table[n_bins] = table[0]
    weights[name] = table
    return padding


def read_back(state: State, file: Path) -> tuple[ModelFiles, dict[str, Tensor], Report]:
    """Return the model that scfm exported into the folder of this file of weights."""
    record = read_record(file.parent, file)
    files, tokens = record.files, Tokens(record.files.vocabulary, record.native_of)
    vocab = file.parent / "vocab.json"
    if read_json(vocab) != {token: row for row, token in enumerate(tokens.names)}:
        raise changed(vocab)
    kept = {name: tensor for name, tensor in state.items() if name not in record.added}
    weights = {pair.native: native_tensor(pair, kept, tokens) for pair in pairs_of(files)}
    notes = [f"{RECORD} says what scfm exported here: this is that model again"]
    return files, weights, Report("flash", parts_of(kept), numbers_in(kept), record.added, notes)


def parts_of(state: State) -> dict[str, int]:
    return dict(Counter(part_of(name) or "unknown" for name in state))


def numbers_in(state: State) -> int:
    return sum(tensor.numel() for tensor in state.values())
