"""What a conversion did, for the command line and the model card."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Report:
    """What a conversion did.

    Attributes:
        layout: of the original's checkpoint, with `, DDP` where names carry its prefix.
        parts: part -> number of the original's tensors that were converted.
        n_parameters: numbers in them.
        left_behind: tensors that were not converted.
        notes: what a reader should know, in words.
    """

    layout: str
    parts: dict[str, int]
    n_parameters: int
    left_behind: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def n_tensors(self) -> int:
        return sum(self.parts.values())

    def lines(self) -> list[str]:
        """Return the report as text."""
        parts = ", ".join(f"{name} {n}" for name, n in self.parts.items())
        lines = [f"layout {self.layout}: {self.n_tensors} tensors, {self.n_parameters:,} parameters", f"parts: {parts}"]
        lines += [f"left behind: {', '.join(self.left_behind)}"] if self.left_behind else []
        return lines + [f"note: {note}" for note in self.notes]
