"""What is no checkpoint of scBERT, or not the one that was meant, is refused with all that is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scbert_models import NAMES, vocabulary_of, write_checkpoint
from torch import Tensor

from scfm.checkpoints.scbert.reading import read_scbert, to_native
from scfm.errors import ScfmError

pytestmark = pytest.mark.golden

State = dict[str, Tensor]
BLOCK = "performer.net.layers.1"


@pytest.fixture
def state(shared: Path) -> State:
    return load_file(shared / "golden/scbert/base_g2v/state_dict.safetensors")


@pytest.fixture
def tuned(shared: Path) -> State:
    return load_file(shared / "golden/scbert/finetune_head/state_dict.safetensors")


def refused(state: State, names: list[str] = NAMES, **options: Any) -> str:
    with pytest.raises(ScfmError) as caught:
        to_native(state, vocabulary_of(names), **options)
    return str(caught.value)


def test_everything_that_does_not_fit_is_in_one_error(state: State) -> None:
    del state[f"{BLOCK}.0.norm.bias"], state[f"{BLOCK}.0.fn.to_k.weight"]
    state |= {"mystery.weight": torch.zeros(3), "norm.extra": torch.zeros(2), "to_out.bias": torch.zeros(5)}
    assert refused(state).splitlines() == [
        "the checkpoint: the tensors are not those of a model of scBERT:",
        "  performer is incomplete; no option allows this: these are missing",
        f"    {BLOCK}.0.fn.to_k.weight (64, 40)",
        f"    {BLOCK}.0.norm.bias (40,)",
        "  unknown is unexpected (--drop PATTERN leaves tensors behind): scBERT has no such part",
        "    mystery.weight (3,)",
        "  norm is unexpected (--drop PATTERN leaves tensors behind): scBERT's norm has no such tensors",
        "    norm.extra (2,)",
        "  mis-shaped; no option allows this: is it another model, or another list of genes?",
        "    to_out.bias is (5,), expected (7,)",
    ]


def test_unexpected_tensors_can_be_left_behind(state: State) -> None:
    state |= {"mystery.weight": torch.zeros(3), "to_out.extra": torch.zeros(3)}
    files, _, report = to_native(state, vocabulary_of(), drop=["mystery.*", "*.extra"])
    assert report.left_behind == ["mystery.weight", "to_out.extra"]
    assert [head.kind for head in files.heads] == ["bins"]
    assert "--drop nothing.* matches no tensor" in refused(state, drop=["nothing.*"])


@pytest.mark.parametrize("n", [126, 128])
def test_another_number_of_names(state: State, tuned: State, n: int) -> None:
    names = [f"G{i}" for i in range(n)]
    said = f"expected ({n + 1}, 40): {n} names of genes, and one position for the empty token at the end of a cell"
    assert f"    pos_emb.emb.weight is (128, 40), {said}" in refused(state, names)
    message = refused(tuned, names)
    assert f"    pos_emb.emb.weight is (128, 40), {said}" in message
    assert f"    to_out.fc1.weight is (512, 128), expected (512, {n + 1}): {n} names" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "\n".join([*NAMES[:126], "G000"]),
            r"names\.txt: 1 ids stand in the vocabulary more than once, e\.g\. \['G000'\]",
        ),
        ("\n\n", r"names\.txt: holds no gene"),
        (None, r"names\.txt: there is no such vocabulary file"),
    ],
)
def test_lists_of_names_that_cannot_be(shared: Path, tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "names.txt").write_text(text)
    path = shared / "golden/scbert/checkpoint/tiny_pretrain_1.pth"
    with pytest.raises(ScfmError, match=message):
        read_scbert(path, vocabulary=tmp_path / "names.txt")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("token_emb.weight", "no tensor is token_emb.weight, so the sizes of the model are not known"),
        ("projection_matrix", "so the sizes of the model are not known"),
        ("norm.weight", "norm is incomplete"),
        ("performer.calls_since_last_redraw", "    performer.calls_since_last_redraw ()"),
        ("to_out.bias", "    to_out.bias (7,)"),
    ],
)
def test_tensors_that_must_be_there(state: State, missing: str, message: str) -> None:
    less = {name: tensor for name, tensor in state.items() if not name.endswith(missing) or "0.norm" in name}
    assert message in refused(less)


def test_heads_that_do_not_add_up(state: State) -> None:
    for i in range(2):
        name = f"performer.net.layers.{i}.0.fn.fast_attention.projection_matrix"
        state[name] = torch.zeros(32, 15)
    assert "to_q has 64 rows, no multiple of the 15 columns of projection_matrix" in refused(state)


def test_a_projection_of_another_width_in_one_block(state: State) -> None:
    state[f"{BLOCK}.0.fn.fast_attention.projection_matrix"] = torch.zeros(30, 16)
    assert f"{BLOCK}.0.fn.fast_attention.projection_matrix is (30, 16), expected (32, 16)" in refused(state)


def test_two_heads_at_once(tuned: State) -> None:
    message = refused(tuned | {"to_out.weight": torch.zeros(7, 40), "to_out.bias": torch.zeros(7)})
    assert "to_out is unexpected (--drop PATTERN leaves tensors behind): scBERT's to_out has no such tensors" in message


def test_labels(state: State, tuned: State) -> None:
    assert "--labels: the checkpoint has no head of classes" in refused(state, labels=["A"])
    assert "--labels: 2 different names in 3 lines; the model has 5" in refused(tuned, labels=["A", "B", "B"])


def test_the_package_performer_pytorch_is_another_model(state: State) -> None:
    """Its features are stabilised otherwise, and its tokens have positions."""
    state["performer.proj_updater.calls_since_last_redraw"] = torch.tensor(3)
    message = refused(state)
    assert (
        "performer is unexpected (--drop PATTERN leaves tensors behind): written by the package performer-" in message
    )


def test_a_checkpoint_of_scgpt_is_none_of_scberts(shared: Path, tmp_path: Path) -> None:
    path = shared / "golden/scgpt/checkpoint_tiny/best_model.pt"
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    with pytest.raises(ScfmError, match=r"is no checkpoint of scBERT: no tensor is performer\.\*; there are \w+"):
        read_scbert(path, vocabulary=tmp_path / "names.txt")


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


def test_a_pickle_that_would_execute_code_is_refused(state: State, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    path, listed = write_checkpoint(tmp_path / "model.pth", state)
    content = torch.load(path, weights_only=True)
    torch.save(content | {"scheduler_state_dict": Malicious(marker)}, path)
    with pytest.raises(ScfmError, match=r"holds code or objects other than tensors.* nothing of it was executed"):
        read_scbert(path, vocabulary=listed)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the same file, read carelessly, does execute it
    assert marker.exists()


@pytest.mark.parametrize("content", [{"model_state_dict": {}}, {"model_state_dict": {"epoch": 3}}, {"epoch": 3}, [1]])
def test_files_without_tensors_by_name(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ScfmError, match=r"model\.pth: holds (no|more than) tensors by name"):
        read_scbert(tmp_path / "model.pth", vocabulary=tmp_path / "names.txt")
