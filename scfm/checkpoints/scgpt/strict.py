"""Where a checkpoint's tensors are not what its args.json announces, all in one message with the way out of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from scfm.checkpoints.fit import Groups, Shapes, incomplete, misshapen, refuse
from scfm.checkpoints.scgpt.form import Form
from scfm.checkpoints.scgpt.names import GENES, Pair
from scfm.checkpoints.scgpt.parts import PARTS, REQUIRED, part_of, said_by

LINEAR = "transformer_encoder.fast_transformer_encoder."


def check(
    shapes: Shapes,
    pairs: Sequence[Pair],
    form: Form,
    args: Mapping[str, Any],
    says: Mapping[str, bool | None],
    *,
    n_tokens: int,
    dropped: Collection[str] = (),
    allow: Collection[str] = (),
    source: str,
) -> None:
    """Compare the tensors of a checkpoint with what args.json announces and with what its form needs.

    Args:
        shapes: of the checkpoint's tensors, by their names in layout flash.
        pairs: what the form needs.
        form: what the tensors show.
        args: content of args.json.
        says: the parts that args.json announces.
        n_tokens: tokens of the vocabulary.
        dropped: names of tensors that are left behind: a part that is left behind whole is not missed.
        allow: parts for which the tensors are right, whatever args.json says.
        source: named in the error.

    Raises:
        ScfmError: lists every missing, unexpected and mis-shaped tensor by part, each part with the reason and the
            option that allows it, if there is one.
    """
    expected = {name: pair.scgpt_shape(n_tokens) for pair in pairs for name in pair.scgpt}
    groups = announced_otherwise(shapes, args, says, dropped, allow)
    told = {name for _, names in groups for name in names}
    groups += incomplete(shapes, expected, part_of, why_unexpected, told)
    hints = {GENES: f"the vocabulary has {n_tokens} tokens, special ones included"}
    groups += misshapen(shapes, expected, "tensors or args.json are another model's", hints)
    if form.conflicts:
        groups.append(("contradictory; no option allows this: is it the args.json of another model?", form.conflicts))
    refuse(groups, f"{source}: tensors and args.json do not fit:")


def announced_otherwise(
    shapes: Shapes,
    args: Mapping[str, Any],
    says: Mapping[str, bool | None],
    dropped: Collection[str],
    allow: Collection[str],
) -> Groups:
    """Return the parts that are missing though announced, or there though not announced, with their tensors."""
    by_part: defaultdict[str | None, list[str]] = defaultdict(list)
    for name, shape in shapes.items():
        by_part[part_of(name)].append(f"{name} {shape}")
    left = {part_of(name) for name in dropped}
    groups = []
    for part in PARTS:
        there = by_part.get(part.name, [])
        why = f"{said_by(part, args)}; {part.hint}" if part.hint else said_by(part, args)
        if part.name in allow:
            continue
        if says[part.name] and not there and part.name not in left and part.name not in REQUIRED:
            way_out = f"--allow {part.name} converts the model without it"
            groups.append((f"{part.name} is missing ({way_out}): {why}", list(part.tensors)))
        elif says[part.name] is False and there:
            matched = [pattern for pattern in part.tensors if any(fnmatchcase(name, pattern) for name in shapes)]
            quoted = " ".join(f"'{pattern}'" for pattern in matched)
            way_out = f"--allow {part.name} keeps it, --drop {quoted} leaves it behind"
            groups.append((f"{part.name} is unexpected ({way_out}): {why}", there))
    return groups


def why_unexpected(part: str | None, names: Sequence[str]) -> str:
    if any(name.startswith(LINEAR) for name in names):
        return "linear attention (fast_transformer_backend 'linear') has no counterpart in scfm"
    return f"scGPT's {part} has no such tensors" if part else "scGPT has no such part"
