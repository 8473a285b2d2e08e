"""The command line as a user meets it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest
from cells import write_cells

from scfm import cli
from scfm.cli import RECIPE_VERBS, VERBS, function, main, verb_parser
from scfm.recipe_reader import parse_recipe
from scfm.version import __version__


def test_overview_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(verb in printed for verb in VERBS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"scfm {__version__}\n"


def test_an_unknown_verb_is_an_error_that_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrian"]) == 2
    assert "'pretrian' is not a verb; choose one of demo, prepare" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_help_describes_every_option(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*verb.split(), "--help"])
    assert stopped.value.code == 0
    assert f"scfm {verb}" in capsys.readouterr().out


def test_the_first_of_two_words_lists_the_verbs_that_begin_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "bench attention" in printed
    assert "pretrain" not in printed
    assert main(["bench"]) == 2
    assert "'bench' is not a verb; choose one of demo" in capsys.readouterr().err


def test_out_of_a_verb_of_its_own_is_not_the_recipes_key(tmp_path: Path) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text("out: runs/mine\nobjectives: [{name: gep}]\n")
    for given, expected in (([], None), (["--out", "a.json"], "a.json"), (["--out=a.json"], "a.json")):
        arguments = ["--config", str(config), *given, "--steps", "3"]
        recipe, options = parse_recipe(arguments, "scfm bench train", "", function(VERBS["bench train"][0]))
        assert (recipe.out, options["out"], options["steps"]) == ("runs/mine", expected, 3)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in RECIPE_VERBS])
def test_every_option_of_a_verb_has_a_description(verb: str) -> None:
    parser, _ = verb_parser(verb, "", function(VERBS[verb][0]))
    assert [action.dest for action in parser._actions if not action.help] == []


def test_bad_input_is_one_message_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scfm.cli", "embed", "cells.h5ad", "--model", "nowhere", "--out", "out.h5ad"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("scfm: cells.h5ad: cannot be read as h5ad (FileNotFoundError")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = write_cells(tmp_path / "cells.h5ad", n=6)
    before = cells.read_bytes()
    assert main(["embed", str(cells), "--model", str(tmp_path), "--out", str(cells)]) == 2
    assert "exists already and is left as it is" in capsys.readouterr().err
    assert cells.read_bytes() == before


def test_importing_scfm_is_light() -> None:
    heavy = "torch lightning scanpy anndata wandb jax numba sklearn matplotlib datasets jsonargparse"
    code = f"import sys, scfm, scfm.cli; print([name for name in {heavy.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_loading_a_model_needs_no_training_library() -> None:
    heavy = "lightning scanpy wandb jax sklearn matplotlib datasets"
    code = f"import sys, scfm; scfm.load; print([name for name in {heavy.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1)])
def test_a_result_that_did_not_pass_is_exit_code_1(passed: bool, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an evaluation in which a method failed: the report is written, and a script sees that it is not whole."""

    class Result:
        def __init__(self) -> None:
            self.passed = passed

    def work(task: str) -> None:
        """Do it.

        Args:
            task: what.
        """
        return Result()  # type: ignore[return-value]

    monkeypatch.setattr(cli, "function", lambda place: work)
    assert main(["evaluate", "annotation"]) == code


def test_options_have_dashes_and_take_underscores(tmp_path: Path) -> None:
    cells = write_cells(tmp_path / "cells.h5ad", n=6)
    for out, keep, size in (("a", "--keep-order", "--cells-per-shard"), ("b", "--keep_order", "--cells_per_shard=3")):
        sized = [size] if "=" in size else [size, "3"]
        assert main(["prepare", str(cells), "--out", str(tmp_path / out), keep, *sized]) == 0
        manifest = json.loads((tmp_path / out / "manifest.json").read_text())
        assert (manifest["shuffled"], len(manifest["shards"])) == (False, 2)


def test_options_that_messages_name_exist() -> None:
    """Whatever option an error message or a page tells the user to pass, some verb takes it."""
    root = Path(__file__).parents[1]
    taken = {"--config", "--resume", "--out", "--from", "--seed", "--trainable", "--task", "--objectives"}
    for verb, (place, what) in VERBS.items():
        if verb not in RECIPE_VERBS:
            parser, _ = verb_parser(verb, what, function(place))
            taken |= {option for action in parser._actions for option in action.option_strings}
        else:
            taken |= {f"--{name}" for name in signature(function(place)).parameters}
    others = {"page.py", "provenance.py"}  # style sheets and git have options of their own
    pages = [path for path in root.glob("scfm/**/*.py") if path.name not in others]
    text = "\n".join(path.read_text() for path in [*pages, root / "README.md", *root.glob("docs/**/*.md")])
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+(?![\w.-])", text))
    torchrun = "--max-restarts --nproc-per-node"
    slurm = (
        "--account --cpus-per-task --exclude --export --gpus-per-task --gres --me --mem --nodes --ntasks-per-node "
        "--partition --signal --time --wait"
    )
    containers = "--file --ipc --nv --rm --tag --user --volume"
    pip = "--constraint --index-url"
    others_options = " ".join([torchrun, slurm, containers, pip, "--version"]).split()
    assert named - taken == set(others_options)
