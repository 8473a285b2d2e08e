"""What scfm raises: bad input, worded for the person who can mend it, and runs that end before their last step."""

from __future__ import annotations

from scfm.redaction import redacted

SAVED = 75  # the exit code of a run that saved itself because it was asked to stop: EX_TEMPFAIL of sysexits.h


class ScfmError(ValueError):
    """Bad input or configuration: says what is wrong, in which file, cell or key, and what to do.

    The command line prints the message without a traceback and exits with code 2. Secrets in the message (keys in URLs,
    tokens) are taken out of it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class RunStopped(SystemExit):
    """A run that ended before its last step through no fault of its recipe: says why, and how to go on.

    It leaves the process with its exit code unless somebody catches it, in processes that a run has started too.

    Args:
        message: for people.
        code: exit code of the process: SAVED, or 1 where a process of the run was lost.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(code)
        self.message = redacted(message)

    def __str__(self) -> str:
        return self.message
