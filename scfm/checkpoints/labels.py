"""Names of classes and batches, which the originals do not save."""

from __future__ import annotations

from collections.abc import Sequence

from scfm.errors import ScfmError


def named(given: Sequence[str] | None, n: int, what: str, original: str, notes: list[str]) -> list[str]:
    """Return n names: those given, else numbers, of which a note then speaks.

    Args:
        given: names by index.
        n: as many as the model has.
        what: the option that gives them.
        original: whose checkpoint it is.
        notes: receives the note.

    Raises:
        ScfmError: not as many names as needed, or one twice.
    """
    if given is None:
        notes.append(f"{original} keeps no names of its {n} {what}: they are numbered; --{what} names them")
        return [str(i) for i in range(n)]
    if len(given) != n or len(set(given)) != n:
        raise ScfmError(f"--{what}: {len(set(given))} different names in {len(given)} lines; the model has {n}")
    return list(given)
