"""No file, recipe or checkpoint can execute code, and no secret is written down."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import tiny_recipe, write_shards
from source_walk import dangers
from untrained import untrained_model

import scfm
from scfm.cli import main
from scfm.errors import ScfmError
from scfm.recipe_reader import read_recipe
from scfm.training.run import pretrain

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("scfm", "scripts", "recipes") for path in (ROOT / folder).rglob("*.py"))

# module names that are no constant: a table of the source itself is looked up, never a recipe or a command line
TABLES = {"scfm/cli.py": "importlib.import_module of a name that is not written here"}

BAD = {
    "torch.load": "import torch\ntorch.load(path)",
    "torch.load, weights_only off": "import torch\ntorch.load(path, weights_only=False)",
    "torch.load, weights_only a value": "import torch\ntorch.load(path, weights_only=safe)",
    "torch.load under another name": "from torch import load as read\nread(path, map_location='cpu')",
    "torch.load of an alias": "import torch as t\nt.load(path)",
    "torch.load, hidden options": "import torch\ntorch.load(path, **options)",
    "torch.hub": "import torch\ntorch.hub.load('a/b', 'c')",
    "torch.jit": "import torch\ntorch.jit.load(path)",
    "load_from_checkpoint": "Module.load_from_checkpoint(path)",
    "fit from a checkpoint": "trainer.fit(module, data, ckpt_path=path)",
    "pickle": "import pickle\npickle.load(file)",
    "pickle, a function alone": "from pickle import loads\nloads(data)",
    "pickle, an Unpickler": "import pickle as p\np.Unpickler(file).load()",
    "dill": "import dill\ndill.loads(data)",
    "joblib": "import joblib\njoblib.load(path)",
    "cloudpickle": "import cloudpickle\ncloudpickle.load(file)",
    "marshal": "import marshal\nmarshal.loads(data)",
    "shelve": "import shelve\nshelve.open(path)",
    "numpy": "import numpy as np\nnp.load(path, allow_pickle=True)",
    "numpy, a value": "import numpy as np\nnp.load(path, allow_pickle=trusted)",
    "numpy, by place": "import numpy\nnumpy.load(path, None, True)",
    "pandas": "import pandas as pd\npd.read_pickle(path)",
    "pandas, HDF": "import pandas as pd\npd.read_hdf(path)",
    "yaml": "import yaml\nyaml.load(text)",
    "yaml, a loader": "import yaml\nyaml.load(text, Loader=yaml.Loader)",
    "yaml, unsafe": "import yaml\nyaml.unsafe_load(text)",
    "yaml, full": "import yaml\nyaml.full_load(text)",
    "eval": "eval(text)",
    "exec": "exec(text)",
    "compile": "compile(text, 'x', 'exec')",
    "shell": "import subprocess\nsubprocess.run(command, shell=True)",
    "shell, a value": "from subprocess import Popen\nPopen(command, shell=wanted)",
    "os.system": "import os\nos.system(command)",
    "os.popen": "from os import popen\npopen(command)",
    "import by name": "from importlib import import_module\nimport_module(recipe.model.name)",
    "import by name, built in": "__import__(name)",
    "import from a file": "import importlib.util\nimportlib.util.spec_from_file_location('x', path)",
    "remote code": "import datasets\ndatasets.load_dataset('a/b', trust_remote_code=True)",
    "inside a function": "def f(path):\n    def g():\n        import pickle\n        return pickle.load(path)",
}  # fmt: skip

GOOD = """
import json, pickle, re, subprocess
import numpy as np, torch, yaml
from importlib import import_module
torch.load(path, weights_only=True, map_location="cpu")
Module.load_from_checkpoint(path, weights_only=True)
trainer.fit(module, data, ckpt_path=path, weights_only=True)
trainer.fit(module, data)
np.load(path)
np.load(path, allow_pickle=False, mmap_mode="r")
yaml.safe_load(text)
yaml.load(text, Loader=yaml.SafeLoader)
json.load(file)
re.compile(text)
model.eval()
pickle.dumps(content)
subprocess.run(["ls"], check=True)
subprocess.run(["ls"], shell=False)
import_module("isal.isal_zlib")
"""


@pytest.mark.parametrize("name", BAD)
def test_the_walk_catches(name: str) -> None:
    assert [line for line, _ in dangers(BAD[name])], name


def test_the_walk_lets_the_rest_pass() -> None:
    assert list(dangers(GOOD)) == []


def test_no_source_executes_what_it_reads() -> None:
    assert len(SOURCES) > 200
    found = [
        f"{place}:{line}: {reason}"
        for place, path in ((str(path.relative_to(ROOT)), path) for path in SOURCES)
        for line, reason in dangers(path.read_text(encoding="utf-8"))
        if TABLES.get(place) != reason
    ]
    assert found == [], "\n".join(found)


# ---------------------------------------------------------------------------------------------------------------------
# files that would run a command if anything of theirs were executed


class Payload:
    """Unpickled it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there once a payload was executed."""
    return tmp_path / "executed"


def test_the_payload_works(mark: Path) -> None:
    """Else none of the tests below could fail."""
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()


def test_a_run_is_not_resumed_from_a_checkpoint_with_code(tmp_path: Path, mark: Path) -> None:
    recipe = tiny_recipe(write_shards(tmp_path / "shards"), tmp_path / "run", trainer={"max_steps": 2})
    pretrain(recipe)
    checkpoint = tmp_path / "run/checkpoints/step=000000001.ckpt"
    for content in ({"state_dict": {}, "extra": Payload(mark)}, Payload(mark)):
        torch.save(content, checkpoint)
        with pytest.raises(Exception, match=r"(?i)weights.only|executed|pickle"):
            pretrain(recipe, resume=str(checkpoint))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocab.json", "cells.hash", "conditions.json"])
def test_a_model_directory_with_a_pickle_for_a_file(tmp_path: Path, mark: Path, name: str) -> None:
    untrained_model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises((ScfmError, ValueError)):
        scfm.load(tmp_path / "model")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["best_model.pt", "panglao_pretrain.pth"])
def test_foreign_weights_with_code(tmp_path: Path, mark: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "original"
    folder.mkdir()
    torch.save({"encoder.embedding.weight": torch.zeros(2, 2), "extra": Payload(mark)}, folder / name)
    assert main(["convert", str(folder / name), "--to", "native", "--out", str(tmp_path / "out")]) == 2
    assert "nothing of it was executed" in capsys.readouterr().err
    assert not mark.exists()


RECIPES = {
    "a tag that calls": "out: !!python/object/apply:os.system ['touch {mark}']",
    "a tag that makes": "data: !!python/object/new:os.system ['touch {mark}']",
    "a tag of a name": "data: {{shards: !!python/name:os.system }}",
    "a section by import path": "model: {{class_path: os.system, init_args: {{command: 'touch {mark}'}}}}",
    "a task by import path": "task: {{class_path: subprocess.Popen, init_args: {{args: [touch, '{mark}']}}}}",
    "an objective by import path": "objectives: [{{class_path: os.system, init_args: {{command: 'touch {mark}'}}}}]",
    "an objective by dotted name": "objectives: [{{name: 'os.system'}}]",
    "a model by dotted name": "model: {{name: 'subprocess.Popen'}}\nobjectives: [{{name: gep}}]",
    "a callback": "trainer: {{callbacks: [{{class_path: subprocess.Popen, init_args: {{args: [touch, '{mark}']}}}}]}}",
    "a strategy by import path": "trainer: {{strategy: {{class_path: os.system, init_args: {{command: touch}}}}}}",
    "a model that holds a pickle": "from: {pickled}",
    "an optimiser by dotted name": "optimizer: {{name: 'os.system'}}\nobjectives: [{{name: gep}}]",
    "an interpolation": "out: '${{oc.env:HOME}}/$(touch {mark})'\nmodel: {{width: '${{touch}}'}}",
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_cannot_execute_code(name: str, tmp_path: Path, mark: Path) -> None:
    """Whatever it says it is refused, by the reader or before anything is trained; on the command line as in Python."""
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes(pickle.dumps(Payload(mark)))
    shards = write_shards(tmp_path / "shards", n=30)
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPES[name].format(mark=mark, pickled=pickled) + "\n")
    options = ["--data.shards", str(shards), "--out", str(tmp_path / "run"), "--trainer.max_steps", "1"]
    assert main(["pretrain", "--config", str(file), *options]) == 2
    keys = {"data": {"shards": str(shards)}, "trainer": {"max_steps": 1}, "out": str(tmp_path / "run")}
    with pytest.raises(ScfmError):
        pretrain(read_recipe(file, keys))
    assert not mark.exists()


def test_recipes_that_come_with_scfm_name_no_code() -> None:
    files = [*(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "scfm/recipes").rglob("*.yaml")]
    assert files
    for file in files:
        assert not re.search(r"!!|class_path|init_args", file.read_text(encoding="utf-8")), file
        yaml.safe_load(file.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# secrets


def test_keys_do_not_reach_logs_or_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys of the environment and of URLs, through a whole run: nothing that it prints or leaves behind has them."""
    keys = {
        "WANDB_API_KEY": "wandb-0123456789",
        "HF_TOKEN": "hf_0123456789abc",
        "AWS_SECRET_ACCESS_KEY": "aws/0123456789",
    }
    for name, key in keys.items():
        monkeypatch.setenv(name, key)
    recipe = tiny_recipe(write_shards(tmp_path / "shards"), tmp_path / "run", trainer={"max_steps": 2})
    recipe.data.cache = "s3://AKIA:aws/0123456789@bucket/cache?token=hf_0123456789abc"  # not looked at: shards are here
    pretrain(recipe)
    written = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert tmp_path / "run/recipe.yaml" in written
    printed = "".join(capsys.readouterr())
    for key in keys.values():
        assert key not in printed
        assert [path for path, content in written.items() if key.encode() in content] == []


def test_keys_in_urls_are_not_in_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    location = "http://user:s3cret@127.0.0.1:1/shards?X-Amz-Signature=s3cret"
    with pytest.raises(ScfmError, match=re.escape("http://***@127.0.0.1:1/shards")) as error:
        pretrain(tiny_recipe(Path("x"), tmp_path / "run", data={"shards": location, "cache": str(tmp_path / "cache")}))
    assert "s3cret" not in str(error.value)
    file = tmp_path / "recipe.yaml"
    file.write_text(f"data: {{shards: '{location}', cache: {tmp_path / 'cache'}}}\nobjectives: [{{name: gep}}]\n")
    assert main(["pretrain", "--config", str(file), "--out", str(tmp_path / "run")]) == 2
    assert "s3cret" not in "".join(capsys.readouterr())
