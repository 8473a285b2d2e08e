"""Where a checkpoint's tensors are not those that its model needs: all of them in one message, each with the reason."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

from scfm.errors import ScfmError

Shapes = Mapping[str, tuple[int, ...]]
Groups = list[tuple[str, list[str]]]  # what is wrong, and where


def incomplete(
    shapes: Shapes,
    expected: Shapes,
    part_of: Callable[[str], str | None],
    why_unexpected: Callable[[str | None, Sequence[str]], str],
    told: Collection[str] = (),
) -> Groups:
    """Return, by part, tensors that a checkpoint lacks and those that its model does not have.

    Args:
        shapes: of the checkpoint's tensors.
        expected: of those that the model needs.
        part_of: the part that a tensor belongs to; None for one that the original does not have.
        why_unexpected: why tensors (`name shape` each) of a part are.
        told: tensors (`name shape` each) of which another message speaks.
    """
    missing: defaultdict[str, list[str]] = defaultdict(list)
    unexpected: defaultdict[str | None, list[str]] = defaultdict(list)
    for name, shape in expected.items():
        if name not in shapes:
            missing[part_of(name) or ""].append(f"{name} {shape}")
    for name, shape in shapes.items():
        if name not in expected and f"{name} {shape}" not in told:
            unexpected[part_of(name)].append(f"{name} {shape}")
    groups = [
        (f"{part} is incomplete; no option allows this: these are missing", names) for part, names in missing.items()
    ]
    for part, names in unexpected.items():
        why = why_unexpected(part, names)
        groups.append((f"{part or 'unknown'} is unexpected (--drop PATTERN leaves tensors behind): {why}", names))
    return groups


def misshapen(shapes: Shapes, expected: Shapes, reason: str, hints: Mapping[str, str]) -> Groups:
    """Return the tensors of another shape than the model needs; `hints` say more of some by name."""
    wrong = [
        f"{name} is {shapes[name]}, expected {shape}" + (f": {hints[name]}" if name in hints else "")
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    return [(f"mis-shaped; no option allows this: {reason}", wrong)] if wrong else []


def refuse(groups: Groups, heading: str) -> None:
    """Raise ScfmError that lists all that is wrong, if anything is."""
    if groups:
        lines = [line for head, names in groups for line in (f"  {head}", *(f"    {name}" for name in sorted(names)))]
        raise ScfmError("\n".join([heading, *lines]))
