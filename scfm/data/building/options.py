"""What a build is asked for: all that its result depends on, and what must not change while it is taken up again."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scfm.data.census import SCHEME
from scfm.data.shards import RESERVED_COLUMNS, Codec
from scfm.errors import ScfmError

SOURCE_COLUMN = "source"
Duplicates = Literal["drop", "keep"]


@dataclass(frozen=True)
class BuildOptions:
    """The options of `scfm prepare` that its result depends on; `prepare` says what each means.

    `vocabulary` and `genes` hold path and SHA-256 of the files, so that a changed file is a changed option.
    """

    sources: list[str]
    vocabulary: list[str]
    genes: list[list[str]]
    obs: list[str]
    accept_normalised: bool
    keep_order: bool
    cells_per_shard: int
    codec: Codec | None
    seed: int
    organism: str | None
    obs_value_filter: str | None
    where: list[str]
    min_genes: int
    min_counts: int
    max_cells_per_source: int | None
    subsample: int | None
    stratify: str | None
    duplicates: Duplicates
    hold_out_by: str | None
    hold_out_fraction: float | None
    hold_out: list[str]

    def __post_init__(self) -> None:
        reserved = [name for name in self.obs if name in (*RESERVED_COLUMNS, SOURCE_COLUMN)]
        if reserved:
            raise ScfmError(f"obs column {', '.join(reserved)}: the name is taken by a column that shards have anyway")
        smallest = {"cells-per-shard": 1, "min-genes": 0, "min-counts": 0, "max-cells-per-source": 1, "subsample": 1}
        for option, least in smallest.items():
            number = getattr(self, option.replace("-", "_"))
            if number is not None and number < least:
                raise ScfmError(f"{option.replace('-', ' ')}: {number} must be at least {least}")
        if self.stratify and self.subsample is None:
            raise ScfmError("--stratify says how to draw a subsample; say its size too, by --subsample")
        if self.obs_value_filter is not None and not any(spec.startswith(SCHEME) for spec in self.sources):
            raise ScfmError("--obs-value-filter chooses cells of a Census, and no source is one; for files use --where")
        self._check_held_out()
        self.conditions  # noqa: B018  raises for a condition that cannot be read

    def _check_held_out(self) -> None:
        given = (self.hold_out_fraction is not None) + bool(self.hold_out)
        if self.hold_out_by is None and given:
            raise ScfmError("--hold-out-by is missing: the obs column whose groups are held out, e.g. donor_id")
        if self.hold_out_by is not None and given != 1:
            raise ScfmError(
                "--hold-out-by needs either --hold-out-fraction, the share of cells to hold out, or --hold-out, the "
                f"groups by name; {'both are' if given else 'neither is'} given"
            )
        if self.hold_out_fraction is not None and not 0 < self.hold_out_fraction < 1:
            raise ScfmError(f"--hold-out-fraction: {self.hold_out_fraction} must lie between 0 and 1")

    @property
    def conditions(self) -> dict[tuple[str, bool], set[str]]:
        """The conditions of `where`: (column, whether it is to be one of the values or none of them) -> values."""
        conditions: defaultdict[tuple[str, bool], set[str]] = defaultdict(set)
        for condition in self.where:
            column, equals, value = condition.partition("=")
            wanted = not column.endswith("!")
            column = column.removesuffix("!").strip()
            if not equals or not column:
                raise ScfmError(f"--where {condition!r}: write COLUMN=VALUE, or COLUMN!=VALUE for all but the value")
            conditions[column, wanted].add(value.strip())
        return dict(conditions)

    @property
    def carried(self) -> list[str]:
        """The obs columns that stand in the shards: those asked for, and the one that says which cells are held out."""
        by = self.hold_out_by
        return [*self.obs, *([by] if by and by not in (*self.obs, SOURCE_COLUMN) else [])]


def file_and_hash(path: str | Path) -> list[str]:
    """Return a file's path and the SHA-256 of its content, "" where it cannot be read (who reads it will say why)."""
    try:
        content = Path(path).read_bytes()
    except OSError:
        return [str(path), ""]
    return [str(path), hashlib.sha256(content).hexdigest()]


def changed_options(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each option that is not what it was."""
    lines = []
    for name, value in now.items():
        if name == "sources" and before.get(name) != value:
            lines.append(_other_sources(before[name], value))
        elif before.get(name) != value:
            lines.append(f"--{name.replace('_', '-')}: was {_shown(before.get(name))}, is {_shown(value)}")
    return lines


def _other_sources(before: Sequence[str], now: Sequence[str]) -> str:
    new, gone = sorted(set(now) - set(before)), sorted(set(before) - set(now))
    said = [f"{what} {', '.join(files)}" for what, files in (("new", new), ("gone", gone)) if files]
    return f"sources: {'; '.join(said) or 'in another order'}"


def _shown(value: object) -> str:
    if value is None or (isinstance(value, Sequence) and not value):
        return "not given"
    text = str(value)
    return text if len(text) < 200 else f"{text[:200]} ..."
