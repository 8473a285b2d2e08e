"""Runs a Dockerfile's install steps without Docker: COPY and RUN, in a folder of their own, with a clean environment.

    python scripts/check_docker_steps.py docker/Dockerfile.cpu

Steps that need the image's system (apt-get, useradd) are named and left out. At the end, `scfm --version`, the imports
of `scfm pretrain` and `pip check` run in the environment that came out.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
OF_THE_SYSTEM = ("apt-get", "useradd")


def instructions(dockerfile: Path) -> Iterator[tuple[str, str]]:
    """Yield each instruction of a Dockerfile and its argument, continued lines joined."""
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    for line in filter(str.strip, text.splitlines()):
        name, argument = line.split(maxsplit=1)
        yield name, " ".join(argument.split())


def sent_to_the_builder(ignore: Path) -> set[str]:
    """Return the names that a .dockerignore of the form `*`, then `!name`, lets through."""
    return {line.removeprefix("!") for line in ignore.read_text().splitlines() if line.startswith("!")}


def copy(source: Path, target: Path) -> None:
    """Copy a file, or the content of a folder, links as links, without Python's caches."""
    if source.is_dir():
        leave = shutil.ignore_patterns("__pycache__", "*.py[cod]")
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, ignore=leave)
    else:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def take_steps(dockerfile: Path, image: Path) -> Path:
    """Take the steps of a Dockerfile in a folder that stands for the image's root; return its virtual environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment.pop("VIRTUAL_ENV", None)
    allowed, folder = sent_to_the_builder(ROOT / ".dockerignore"), image
    for name, argument in instructions(dockerfile):
        if name == "WORKDIR":
            folder = image / argument.lstrip("/")
            folder.mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            *sources, target = argument.split()
            for source in sources:
                if Path(source).parts[0] not in allowed:
                    raise SystemExit(f"{dockerfile}: COPY {source}, which .dockerignore keeps from the builder")
                copy(ROOT / source, folder / target)
        elif name == "RUN" and any(word in argument for word in OF_THE_SYSTEM):
            print(f"left out: RUN {argument}", flush=True)
        elif name == "RUN":
            command = re.sub(r"--mount=\S+ ", "", argument).replace("/opt/scfm", str(image / "opt/scfm"))
            print(f"RUN {command}", flush=True)
            environment["PATH"] = os.pathsep.join([str(image / "opt/scfm/bin"), environment["PATH"]])
            subprocess.run(["sh", "-ec", command], cwd=folder, env=environment, check=True)
    return image / "opt" / "scfm"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dockerfile", type=Path)
    dockerfile = parser.parse_args().dockerfile
    with tempfile.TemporaryDirectory() as image:
        made = take_steps(dockerfile, Path(image)) / "bin"
        for command in (
            ["scfm", "--version"],
            ["python", "-c", "import torch, scfm.training.run; print('torch', torch.__version__)"],
            ["python", "-m", "pip", "check"],
        ):
            subprocess.run([str(made / command[0]), *command[1:]], cwd=image, check=True)
    print(f"{dockerfile}: the steps make an environment that works", file=sys.stderr)


if __name__ == "__main__":
    main()
