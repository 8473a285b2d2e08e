"""Scripts and images, looked over by the programs that know their languages, and what those do not see."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from launchpad import ROOT

DOCKERFILES = [ROOT / "docker" / "Dockerfile", ROOT / "docker" / "Dockerfile.cpu"]
SCRIPTS = [path for ending in ("sh", "sbatch") for path in sorted((ROOT / "scripts").rglob(f"*.{ending}"))]
STEPS = runpy.run_path(str(ROOT / "scripts" / "check_docker_steps.py"))


def found(program: str) -> str:
    """Return a program of this environment or of the system; skip the test where there is none."""
    here = shutil.which(program, path=str(Path(sys.executable).parent)) or shutil.which(program)
    if here is None:
        pytest.skip(f"{program} is not installed; the extra `dev` brings it")
    return here


def test_shellcheck_finds_nothing() -> None:
    assert len(SCRIPTS) >= 8
    fakes = [path for folder in ("bin", "stub") for path in (ROOT / "tests" / "launching" / folder).iterdir()]
    in_bash = [path for path in fakes if path.read_text().startswith("#!/usr/bin/env bash")]
    command = [found("shellcheck"), "-x", *map(str, SCRIPTS), *map(str, in_bash)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        [found("hadolint"), "--no-color", *map(str, DOCKERFILES)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def steps(dockerfile: Path, name: str) -> list[str]:
    return [argument for instruction, argument in STEPS["instructions"](dockerfile) if instruction == name]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_images(dockerfile: Path) -> None:
    """Pinned, not root, torch before all else, and nothing copied that the builder is not sent."""
    (base,) = steps(dockerfile, "FROM")
    assert base.partition(":")[2] not in ("", "latest")
    assert steps(dockerfile, "USER") == ["1001"]
    installs = [line for line in steps(dockerfile, "RUN") if "pip install" in line]
    assert installs[0].endswith("torch")
    assert all("--constraint constraints.txt" in line for line in installs[:-1])
    assert installs[-1] == "pip install --no-cache-dir --no-deps ."
    copied = [source for line in steps(dockerfile, "COPY") for source in line.split()[:-1]]
    sent = STEPS["sent_to_the_builder"](ROOT / ".dockerignore")
    assert {Path(source).parts[0] for source in copied} == {name for name in sent if not name.startswith("**")}
    assert all((ROOT / source).exists() for source in copied)


def test_services_share_a_volume() -> None:
    compose: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    services = compose["services"]
    assert set(services) == {"cpu", "gpu"}
    assert all("${SCFM_WORK:-work}:/work" in service["volumes"] for service in services.values())
    assert "work" in compose["volumes"]
    for service in services.values():
        assert (ROOT / service["build"]["dockerfile"]).exists()
    assert services["gpu"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


@pytest.mark.slow
@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_install_steps_of_images_make_an_environment(dockerfile: Path) -> None:
    command = [sys.executable, "scripts/check_docker_steps.py", str(dockerfile.relative_to(ROOT))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
