"""docs/launching.md: what it tells to launch starts, with arguments that scfm takes; on a CPU it can be followed."""

from __future__ import annotations

import re
import shlex
import shutil

import pytest
from commands import take
from launchpad import ROOT, Launchpad

PAGE = (ROOT / "docs" / "launching.md").read_text()
LAUNCHES = re.findall(
    r"^(?:HOSTS=|scripts/|sbatch ).*$", "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)), re.MULTILINE
)
ON_A_CPU = ["## 2. Data", "## 3. Plan first", "## 4. A smoke run on the CPU", "## 11. Handing over"]


def launched(place: Launchpad, line: str) -> int:
    """Do what a line of the page does, where `sbatch` runs the script at once; return the exit code."""
    words = shlex.split(line.removesuffix(" &"))
    if words[0] != "sbatch":
        return place.start("bash", "-c", line.removesuffix(" &"), DOES="done").wait(30)
    script = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
    options = dict(word.removeprefix("--").split("=", 1) for word in words[1:script])
    shape = {"SLURM_NTASKS_PER_NODE": options.get("ntasks-per-node", 2), "SLURM_JOB_NUM_NODES": options.get("nodes", 1)}
    return place.sbatch(words[script], *words[script + 1 :], DOES="done", **shape).wait(30)


@pytest.mark.parametrize("line", LAUNCHES)
def test_what_the_page_launches_starts(stand_in: Launchpad, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert launched(stand_in, line) == 0, stand_in.log()
    asked = stand_in.noted("starts")
    asked += [re.sub(r".*--no-python scfm ", "", line) for line in stand_in.noted("torchruns")]
    if submitted := stand_in.noted("submitted"):  # the page's build of a corpus, which submits both halves
        arguments = submitted[0].partition(".sbatch ")[2].split()
        assert stand_in.sbatch("scripts/slurm/build_corpus.sbatch", *arguments, DOES="done").wait(30) == 0
        asked += stand_in.noted("starts")
    assert asked
    for words in asked:
        take(shlex.split(words))


def test_the_page_launches_in_every_way() -> None:
    scripts = {path.name for folder in ("slurm", "launch") for path in (ROOT / "scripts" / folder).iterdir()}
    named = {name for name in scripts if any(name in line for line in LAUNCHES)}
    assert named == scripts - {"train.sh", "build_corpus.sbatch"}  # which others of them start


@pytest.mark.slow
def test_the_page_is_followed_on_a_cpu(real: Launchpad) -> None:
    """From an empty folder, word by word."""
    (real.folder / "recipes").symlink_to(ROOT / "recipes")
    shutil.rmtree(real.folder / "shards")
    for title in ON_A_CPU:
        section = PAGE.partition(title)[2].partition("\n## ")[0]
        for block in re.findall(r"```bash\n(.*?)```", section, re.DOTALL):
            assert real.start("bash", "-euc", block).wait(280) == 0, real.log()
    assert (real.folder / "embedded.h5ad").exists()
    assert (real.folder / "encoder" / "model.onnx").exists()
