"""`scfm status`: how a run stands, by its files alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from scfm.cli import main
from scfm.errors import ScfmError
from scfm.run_status import read_status, spoken
from scfm.status import as_json, print_status, size, sparkline

NOW = 2_000_000_000.0
RECIPE = "out: elsewhere\ncheckpoint: {best: valid/loss}\ntrainer: {max_steps: 40}\nfrom: null\n"
FIRST = "scgpt: 4,161 parameters; 108 training and 12 validation cells, 60 genes; 2 x cpu, precision 32-true"


def line(step: int) -> str:
    return f"step {step}/40  loss 3  gep 3  lr 0.01  100 cells/s  wait 1.0%  eta 0:01:05\n"


def rows(step: int, loss: float) -> str:
    speeds = {"step_seconds": 2.0, "cells_per_second": 100.0, "data_wait": 0.01, "mfu": 0.3, "tflops": 1.5}
    parts = {"train/loss": loss, "train/gep": loss, "train/learning_rate": 0.01}
    parts |= {f"speed/{name}": value for name, value in speeds.items()}
    return "".join(f"{step},{name},{value!r}\n" for name, value in parts.items())


def write_run(folder: Path, age: float, log: str = "", metrics: str = "") -> Path:
    """Write a run that was last touched so many seconds before NOW."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "log.txt").write_text(f"{FIRST}\n{line(10)}{line(20)}{log}")
    validated = "20,valid/loss,2.5\n10,valid/loss,2.75\n"
    told = f"0,baseline/gene mean,4.5\n{rows(10, 9.0)}{rows(20, 3.0)}{validated}"
    (folder / "metrics.csv").write_text(f"step,metric,value\n{told}{metrics}")
    for name in ("step=000000020.ckpt", "step=000000010.ckpt", "best.ckpt", ".step=000000030.ckpt.partial"):
        (folder / "checkpoints" / name).write_bytes(b"0" * 2_500_000)
    touch(folder, age)
    return folder


def touch(folder: Path, age: float) -> None:
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (NOW - age, NOW - age))


def printed(run: Path) -> str:
    console = Console(width=200, record=True, file=StringIO())
    print_status(read_status(run, NOW), console)
    return console.export_text()


def test_a_run_at_work(tmp_path: Path) -> None:
    found = read_status(write_run(tmp_path / "run", age=12), NOW)
    assert (found.state, found.step, found.steps, found.eta_seconds) == ("running", 20, 40, 65)
    assert found.why == "as far as its files say: last written 12 s ago, reports come about every 20 s"
    assert found.best == {"metric": "valid/loss", "value": 2.5, "step": 20}
    assert found.hours == pytest.approx(20 * 2 / 3600)
    assert list(found.losses) == ["train/loss", "train/gep", "valid/loss"]
    assert [c.name for c in found.checkpoints] == ["step=000000010.ckpt", "step=000000020.ckpt", "best.ckpt"]
    assert found.checkpoints[0].bytes == 2_500_000
    said = printed(tmp_path / "run")
    for part in ("running", "20 of 40 (50%)", "65 s", "100 cells/s", "█▁", "2.5 MB", "gene mean", FIRST):
        assert part in said
    assert "--resume" not in said


@pytest.mark.parametrize(("age", "state"), [(119, "running"), (121, "stopped"), (90_000, "stopped")])
def test_silence_is_a_stop(tmp_path: Path, age: float, state: str) -> None:
    found = read_status(write_run(tmp_path / "run", age), NOW)
    assert found.state == state
    assert (found.eta_seconds is None) == (state == "stopped")
    assert f"last written {spoken(age)} ago" in found.why


def test_slow_reports_and_long_validations_are_waited_for(tmp_path: Path) -> None:
    slow = "30,speed/step_seconds,100.0\n30,speed/validation_seconds,2000.0\n"
    assert read_status(write_run(tmp_path / "run", 8_999, metrics=slow), NOW).state == "running"
    touch(tmp_path / "run", 9_001)  # five reports of 10 steps, and two validations
    assert read_status(tmp_path / "run", NOW).state == "stopped"


def test_a_finished_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 5, log="ended early: 3 validations in a row were not better\nmodel: x/model\n")
    found = read_status(run, NOW)
    assert found.state == "finished"
    assert "ended early: 3 validations" in found.why
    assert found.go_on == ""


def test_a_finished_run_that_goes_on_is_running(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 5, log=f"model: x/model\n{FIRST}\n{line(30)}")
    assert read_status(run, NOW).state == "running"


def test_a_run_that_was_asked_to_stop(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 5, log="step 23: SIGTERM, saved; --resume auto continues it\n")
    found = read_status(run, NOW)
    assert found.state == "stopped"
    assert found.why == "its log says: step 23: SIGTERM, saved; --resume auto continues it"
    assert f"scfm pretrain --config {run}/recipe.yaml --out {run} --resume auto" in printed(run)


def test_fine_tuning_goes_on_as_such(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a run", 90_000)
    (run / "recipe.yaml").write_text("from: model\ntask: {name: annotation}\ndata: {shards: 's3://***@bucket'}\n")
    found = read_status(run, NOW)
    assert found.go_on.startswith(f"scfm finetune --config '{run}/recipe.yaml' --out '{run}' ")
    assert "in place of secrets" in found.notes[0]


@pytest.mark.parametrize("cut", ["metrics.csv", "log.txt"])
def test_half_written_last_lines(tmp_path: Path, cut: str) -> None:
    run = write_run(tmp_path / "run", 5, log=line(30), metrics=rows(30, 1.0))
    whole = (run / cut).read_bytes()
    for end in range(len(whole) - 200, len(whole)):
        (run / cut).write_bytes(whole[:end])
        found = read_status(run, NOW)
        assert found.step in (20, 30)
        assert found.losses["train/loss"][-1] in ((20, 3.0), (30, 1.0))


def test_a_copy_says_the_same(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 5, log="model: x/model\n")
    shutil.copytree(run, tmp_path / "copy")
    (original, copied) = (read_status(folder, NOW) for folder in (run, tmp_path / "copy"))
    assert (original.state, original.step, original.losses) == (copied.state, copied.step, copied.losses)


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(RECIPE)
    touch(run, 5)
    assert read_status(run, NOW).state == "running"
    touch(run, 5_000)
    found = read_status(run, NOW)
    assert (found.state, found.step, found.steps) == ("not started", None, 40)
    assert "not started" in printed(run)


def test_ranks_guard_and_probes(tmp_path: Path) -> None:
    more = "20,speed/slowest_rank,3.0\n20,speed/slowest_ratio,1.8\n20,guard/skipped,2.0\n20,probe/accuracy,0.75\n"
    slow = "step 20  slow rank: 3 on node7 takes 4 s of its own per step\n"
    said = printed(write_run(tmp_path / "run", 5, log=slow, metrics=more))
    for part in ("3, 1.80 times the median", "skipped 2", "probe/accuracy", "node7"):
        assert part in said


def test_losses_that_are_no_numbers(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 5, metrics="30,train/loss,nan\n30,train/loss,inf\n")
    found = read_status(run, NOW)
    assert "!!" in printed(run)
    assert json.loads(as_json(found))["losses"]["train/loss"][-1] == [30, None]


def test_json_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(write_run(tmp_path / "run", 5)), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["speed"]["cells_per_second"]) == (20, 100.0)


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    (write_run(runs / "b", 5) / "model").mkdir()
    (runs / "b/model/config.json").write_text("{}")
    write_run(runs / "a", 5)
    for folder, words in [
        (tmp_path / "absent", "there is no such folder"),
        (runs / "a/log.txt", "is a file"),
        (tmp_path, "not a run directory"),
        (runs, "it holds the runs a, b: name one"),
        (runs / "b/model", f"it is the model of the run {runs / 'b'}"),
    ]:
        with pytest.raises(ScfmError, match=words):
            read_status(folder)
    (runs / "a/recipe.yaml").write_text("")
    with pytest.raises(ScfmError, match="starting this very moment"):
        read_status(runs / "a")


def test_neither_torch_nor_lightning_is_imported(tmp_path: Path) -> None:
    """A look at a run must not take the seconds, nor the memory, that these take."""
    code = "import sys; from scfm.cli import main; main(['status', sys.argv[1]]); print(sorted(sys.modules))"
    run = str(write_run(tmp_path / "run", 5))
    done = subprocess.run([sys.executable, "-c", code, run], capture_output=True, text=True, check=True)
    modules = done.stdout.splitlines()[-1]
    assert "'rich'" in modules
    for heavy in ("torch", "lightning", "numpy", "pandas"):
        assert f"'{heavy}'" not in modules


def test_sparklines() -> None:
    assert sparkline([3, 2, 1, 0]) == "█▆▃▁"
    assert sparkline([1, 1, 1]) == "▁▁▁"
    assert sparkline([0, 0, 7, 7], width=2) == "▁█"
    assert sparkline([1, float("nan"), 2]) == "▁!█"
    assert len(sparkline(list(range(1000)))) == 48


def test_words_for_times_and_sizes() -> None:
    said = [spoken(seconds) for seconds in (0.04, 12, 89, 90, 5_399, 5_400, 7_260, 172_740, 172_800)]
    assert said == ["0.0 s", "12 s", "89 s", "2 min", "1 h 30 min", "1 h 30 min", "2 h 1 min", "47 h 59 min", "2 days"]
    assert [size(n) for n in (500, 2_500_000, 1_500_000_000)] == ["0.5 kB", "2.5 MB", "1.5 GB"]
