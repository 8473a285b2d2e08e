"""What a score is called and how it is computed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """What a score is called, how it is computed, and which direction is better."""

    title: str
    protocol: str
    higher_is_better: bool = True
