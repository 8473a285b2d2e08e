"""scfm as a command that starts at once: one process imports it, and forks where `bin/scfm` asks for a run.

Launch scripts start many processes, each of which would import torch and lightning for seconds.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from importlib import import_module
from typing import NoReturn

IMPORTS = [
    "lightning",
    "scfm.cli",
    "scfm.recipe_reader",
    "scfm.training.run",
    "scfm.data.prepare",
    "scfm.data.transport",
    "scfm.plan",
]


def serve(place: str) -> NoReturn:
    """Import scfm, then answer whoever connects to a Unix socket, each in a process of its own."""
    for name in IMPORTS:
        import_module(name)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(place)
    listening.listen(16)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who answer
    while True:
        asking, _ = listening.accept()
        if os.fork() == 0:
            answer(asking)
        asking.close()


def answer(asking: socket.socket) -> NoReturn:
    """Run what was asked for with the streams that came with it; say its process id, then how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams, _, _ = socket.recv_fds(asking, 1 << 20, 3)
    process = os.fork()
    if process == 0:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os._exit(run(**json.loads(message)))
    asking.sendall(f"{process}\n".encode())
    asking.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])}\n".encode())
    os._exit(0)


def run(arguments: list[str], environment: dict[str, str], folder: str) -> int:
    """Be the process that the command line asks for; return its exit code."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    rank_zero = import_module("lightning.fabric.utilities.rank_zero")
    rank_zero.rank_zero_only.rank = rank_zero._get_rank() or 0  # read from the environment when it is imported
    try:
        return import_module("scfm.cli").main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
