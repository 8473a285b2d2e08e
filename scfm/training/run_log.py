"""Text files that a run adds lines to: log.txt and metrics.csv; a full disk delays the lines, and ends no run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from scfm.redaction import redacted
from scfm.training.saving import is_full


class Lines:
    """A text file at whose end lines are written, each whole or not at all.

    Lines that find no room on the disk are kept, and written before the next ones.

    Args:
        path: created where it is absent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept = ""

    def add(self, text: str) -> None:
        """Write text, of lines that end in a line break."""
        told = bool(self.kept)
        self.kept += text
        with self.path.open("ab", buffering=0) as file:
            end = os.fstat(file.fileno()).st_size
            try:
                rest = self.kept.encode()
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError as error:
                if not is_full(error):
                    raise
                file.truncate(end)
                if not told:
                    print(f"{self.path}: no space left; lines are kept until there is some", file=sys.stderr)
                return
        self.kept = ""


class RunLog:
    """Prints what a run says, and writes it to log.txt.

    Args:
        path: the log.
    """

    def __init__(self, path: Path) -> None:
        self.lines = Lines(path)

    def say(self, line: str) -> None:
        """Print and write a line, in the process that writes the run directory."""
        if getattr(rank_zero_only, "rank", 0) == 0:
            self.say_anyhow(line)

    def say_anyhow(self, line: str) -> None:
        """Print and write a line, whichever process this is."""
        line = redacted(line)
        print(line, flush=True)
        self.lines.add(line + "\n")
