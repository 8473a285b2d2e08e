"""The error that scfm raises for bad input: worded for the person who can mend it."""

from __future__ import annotations

from scfm.redaction import redacted


class ScfmError(ValueError):
    """Bad input or configuration: says what is wrong, in which file, cell or key, and what to do.

    The command line prints the message without a traceback and exits with code 2. Secrets in the message (keys in URLs,
    tokens) are taken out of it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))
