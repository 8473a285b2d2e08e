"""Publishing a model and loading it by its name, with a local folder for the Hub."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cells import made_up_cells
from hub_double import HubDouble
from untrained import untrained_model

import scfm
from scfm.checkpoints.hub import FILES, push_folder
from scfm.checkpoints.native import read_model
from scfm.cli import main
from scfm.errors import ScfmError

TOKEN = "hf_0123456789abcdefghij"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubDouble:
    monkeypatch.chdir(tmp_path)
    return HubDouble(tmp_path / "hub", monkeypatch)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".gitattributes"}


def test_what_is_pushed_is_the_native_directory(hub: HubDouble, tmp_path: Path) -> None:
    model = untrained_model()
    model.files.card, model.files.cell_hashes = "---\nlicense: mit\n---\n", np.arange(3, dtype=np.uint64)
    model.save_pretrained(tmp_path / "model")
    assert model.push_to_hub("lab/cells", token=TOKEN) == "https://huggingface.co/lab/cells"
    assert contents(hub.folder / "lab/cells") == contents(tmp_path / "model")
    assert set(contents(tmp_path / "model")) == set(FILES)
    assert hub.private == {"lab/cells"}  # nothing is public that nobody asked to be
    assert hub.tokens == [TOKEN]


def test_a_published_model_in_three_lines(hub: HubDouble) -> None:
    adata = made_up_cells(12)
    expected = untrained_model().embed(adata.copy()).obsm["X_scfm"]
    untrained_model().push_to_hub("lab/cells", private=False)
    model = scfm.load("lab/cells")
    embedded = model.embed(adata)
    assert np.array_equal(embedded.obsm["X_scfm"], expected)
    assert embedded.uns["scfm"]["model"] == "lab/cells"
    assert scfm.PretrainedModel.from_pretrained("lab/cells", revision="main").files.vocabulary == model.files.vocabulary
    assert read_model("lab/cells").vocabulary == model.files.vocabulary
    assert not hub.private


def test_pushing_again_leaves_no_former_files(hub: HubDouble) -> None:
    model = untrained_model()
    model.push_to_hub("lab/cells")
    (hub.folder / "lab/cells/pytorch_model.bin").write_bytes(b"pickle")
    model.push_to_hub("lab/cells")
    assert "pytorch_model.bin" not in contents(hub.folder / "lab/cells")
    assert (hub.folder / "lab/cells/.gitattributes").exists()


def test_only_the_files_of_a_model_are_fetched(hub: HubDouble) -> None:
    """Whatever else a repository holds, pickles and scripts among it, never comes to this disk."""
    untrained_model().push_to_hub("lab/cells")
    for name in ("pytorch_model.bin", "modeling.py", "checkpoint.pt"):
        (hub.folder / "lab/cells" / name).write_bytes(b"\x80\x04")
    scfm.load("lab/cells")
    assert set(contents(hub.folder / "cache/lab/cells")) <= set(FILES)


def test_folders_that_hold_more_are_not_pushed(hub: HubDouble, tmp_path: Path) -> None:
    untrained_model().save_pretrained(tmp_path / "model")
    (tmp_path / "model/notes").mkdir()
    (tmp_path / "model/notes/patients.csv").touch()
    with pytest.raises(ScfmError, match="are not published: notes/patients"):
        push_folder(tmp_path / "model", "lab/cells")
    with pytest.raises(ScfmError, match="is not a model directory: config"):
        push_folder(tmp_path / "nothing", "lab/cells")
    with pytest.raises(ScfmError, match="has the form org/name"):
        push_folder(tmp_path / "model", "cells")
    assert not hub.folder.exists()


@pytest.mark.parametrize("name", ["lab/absent", "lab/other"])
def test_models_that_are_not_there(hub: HubDouble, name: str) -> None:
    (hub.folder / "lab/other").mkdir(parents=True)
    with pytest.raises(ScfmError, match=r"cannot be fetched .*HF_TOKEN|is not an scfm model"):
        scfm.load(name)


def test_the_token_is_never_said(
    hub: HubDouble, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.reachable = False
    with pytest.raises(ScfmError, match="no route to host") as pulled:
        scfm.load("lab/cells", token=TOKEN)
    with pytest.raises(ScfmError, match="no route to host") as pushed:
        untrained_model().push_to_hub("lab/cells", token=TOKEN)
    assert main(["check", "cells.h5ad", "--model", "lab/cells"]) == 2
    said = [str(pulled.value), str(pushed.value), *capsys.readouterr()]
    assert not any(TOKEN in text for text in said)
    assert pulled.value.__suppress_context__


def test_a_token_that_is_in_no_variable_is_not_said_either(hub: HubDouble) -> None:
    hub.reachable = False
    with pytest.raises(ScfmError) as error:
        scfm.load("lab/cells", token=TOKEN)
    assert TOKEN not in str(error.value)


def test_what_lies_on_this_disk_comes_first(hub: HubDouble, tmp_path: Path) -> None:
    """A path that is mistyped is not asked for on the Hub."""
    untrained_model().save_pretrained(tmp_path / "runs/model")
    assert scfm.load("runs/model").source == "runs/model"
    for place in ("runs/modle", "../runs", tmp_path / "absent", "./lab/cells", "a/b/c"):
        with pytest.raises(ScfmError, match="is not a model directory"):
            scfm.load(place)
    with pytest.raises(ScfmError, match="no name on the Hub, so it has no revision v2"):
        scfm.load("runs/model", revision="v2")
    assert hub.tokens == []
