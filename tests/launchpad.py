"""A folder to launch from: the repository's scripts, a SLURM of one machine, and what jobs leave there."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Launchpad:
    """A folder with a recipe, shards and the repository's scripts, and the environment that jobs run in."""

    def __init__(self, folder: Path, path: list[Path], **environment: str) -> None:
        self.folder, self.notes, self.job = folder, folder / "notes", free_job_id()
        self.notes.mkdir()
        (folder / "scripts").symlink_to(ROOT / "scripts")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
        on_path = os.pathsep.join([*map(str, path), str(Path(sys.executable).parent), clean["PATH"]])
        self.environment = clean | {"PATH": on_path, "LAUNCH_NOTES": str(self.notes)} | environment
        self.running: list[subprocess.Popen[str]] = []

    def start(self, *command: object, **environment: str) -> subprocess.Popen[str]:
        """Start a command in the folder, the leader of a process group; its output is kept in `log`."""
        with (self.folder / "log").open("a") as log:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=self.folder,
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self.running.append(process)
        return process

    def sbatch(self, script: str, *arguments: object, restarts: int = 0, **variables: object) -> subprocess.Popen[str]:
        """Start a batch script as SLURM does: its #SBATCH lines, then what the command line overrides, as variables."""
        text = (ROOT / script).read_text()
        options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
        asked = {
            "SLURM_JOB_ID": self.job,
            "SLURM_JOB_NUM_NODES": options["nodes"],
            "SLURM_JOB_NODELIST": "here[1-2]",
            "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
            "SLURM_MEM_PER_NODE": int(options["mem"].removesuffix("G")) * 1024,
            "SLURM_NTASKS_PER_NODE": options.get("ntasks-per-node"),
            "SLURM_RESTART_COUNT": restarts or None,
        } | variables
        given = {name: str(value) for name, value in asked.items() if value is not None}
        return self.start("bash", script, *arguments, **given)

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def noted(self, name: str) -> list[str]:
        """Return the lines of a note that one of the fakes took."""
        note = self.notes / name
        return note.read_text().splitlines() if note.exists() else []

    def end(self) -> None:
        """Kill whatever still runs."""
        for process in self.running:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            finally:
                process.wait()


def free_job_id() -> int:
    """Return a job's id whose port, that Lightning makes of it, nobody listens at."""
    for job in range(1000 + os.getpid() % 5000, 9999):
        with socket.socket() as trial:
            try:
                trial.bind(("localhost", 15000 + job))
            except OSError:
                continue
        return job
    raise AssertionError("no port from 15000 to 24999 is free")


def until(holds: Callable[[], object], seconds: float = 30) -> None:
    """Wait until something holds; fail where it does not within some seconds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)
