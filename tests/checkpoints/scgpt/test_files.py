"""Files from elsewhere: pickles that would execute code, damage, and vocabularies in scGPT's order."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scgpt_folders import TOKENS, same, write_folder

from scfm.checkpoints.gene_names import names_of
from scfm.checkpoints.scgpt.reading import read_scgpt
from scfm.checkpoints.scgpt.tokens import read_tokens
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.errors import ScfmError

pytestmark = pytest.mark.golden


@pytest.fixture
def tiny(shared: Path, tmp_path: Path) -> Path:
    """A copy of the small published checkpoint."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for name in ("args.json", "vocab.json", "best_model.pt"):
        shutil.copy(shared / "golden/scgpt/checkpoint_tiny" / name, folder / name)
    return folder


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


def save_as_torch(content: Any, path: Path) -> None:
    torch.save(content, path)


def save_as_old_torch(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_as_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("save", [save_as_torch, save_as_old_torch, save_as_pickle])
def test_a_pickle_that_would_execute_code_is_refused(
    tiny: Path, tmp_path: Path, save: Callable[[Any, Path], None]
) -> None:
    marker = tmp_path / "executed"
    weights = torch.load(tiny / "best_model.pt", weights_only=True)
    save(weights | {"harmless": Malicious(marker)}, tiny / "best_model.pt")
    with pytest.raises(ScfmError) as refused:
        read_scgpt(tiny)
    assert not marker.exists()
    for said in ("best_model.pt: holds code or objects", "nothing of it was executed", "torch.save(model.state_dict()"):
        assert said in str(refused.value)
    if save is not save_as_pickle:  # the same file, read carelessly, does execute it
        torch.load(tiny / "best_model.pt", weights_only=False)
        assert marker.exists()


def test_damaged_files_are_called_that(tiny: Path) -> None:
    path = tiny / "best_model.pt"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # within a tensor: torch itself would not notice
    for damaged in (whole[: len(whole) // 2], flipped, b"", b"\x93NUMPY not weights at all", bytes(range(256)) * 8):
        path.write_bytes(damaged)
        with pytest.raises(ScfmError, match=r"best_model\.pt: is damaged or no torch file"):
            read_scgpt(tiny)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3, "state": {"a": torch.zeros(1)}}, {}, {1: torch.zeros(1)}])
def test_a_file_without_tensors_by_name_says_how_to_save_them(tiny: Path, content: Any) -> None:
    torch.save(content, tiny / "best_model.pt")
    with pytest.raises(ScfmError, match=r"holds (no|more than) tensors by name.*save the weights alone"):
        read_scgpt(tiny)


def test_the_old_torch_format_is_read(tiny: Path) -> None:
    _, expected, _ = read_scgpt(tiny)
    save_as_old_torch(torch.load(tiny / "best_model.pt", weights_only=True), tiny / "old.pt")
    assert same(read_scgpt(tiny / "old.pt")[1], expected)


def test_which_file_holds_the_weights(tiny: Path) -> None:
    _, expected, _ = read_scgpt(tiny)
    (tiny / "best_model.pt").rename(tiny / "epoch_6.pt")
    assert same(read_scgpt(tiny)[1], expected)
    assert same(read_scgpt(tiny / "epoch_6.pt")[1], expected)
    shutil.copy(tiny / "epoch_6.pt", tiny / "epoch_5.pt")
    with pytest.raises(ScfmError, match=r"expected best_model\.pt or model\.pt, found epoch_5\.pt, epoch_6\.pt"):
        read_scgpt(tiny)
    for path in tiny.glob("*.pt"):
        path.unlink()
    with pytest.raises(ScfmError, match=r"found no \.pt or \.pth file; give the file itself"):
        read_scgpt(tiny)


def test_args_and_vocabulary_can_stand_elsewhere(tiny: Path, tmp_path: Path) -> None:
    _, expected, _ = read_scgpt(tiny)
    (tmp_path / "elsewhere").mkdir()
    args, vocab = ((tiny / f"{name}.json").rename(tmp_path / f"elsewhere/{name}.json") for name in ("args", "vocab"))
    with pytest.raises(ScfmError, match=r"args\.json: there is no such file; name the args\.json .* with --args"):
        read_scgpt(tiny)
    assert same(read_scgpt(tiny, args=args, vocabulary=vocab)[1], expected)
    args.write_text("{")
    with pytest.raises(ScfmError, match=r"args\.json: is not JSON"):
        read_scgpt(tiny, args=args, vocabulary=vocab)
    args.write_text("[]")
    with pytest.raises(ScfmError, match=r"args\.json: holds a list; expected an object of settings"):
        read_scgpt(tiny, args=args, vocabulary=vocab)


# vocabularies


def test_tokens_in_any_order_are_brought_into_ours(tiny: Path, tmp_path: Path) -> None:
    """Special tokens first, genes in reverse: the rows of the embedding follow their genes."""
    published, expected, _ = read_scgpt(tiny)
    state = torch.load(tiny / "best_model.pt", weights_only=True)
    order = [199, 197, 198, *reversed(range(197))]
    permuted = state | {"encoder.embedding.weight": state["encoder.embedding.weight"][order]}
    tokens = {TOKENS[i]: row for row, i in enumerate(order)}
    args = json.loads((tiny / "args.json").read_text())
    files, weights, _ = read_scgpt(write_folder(tmp_path / "permuted", permuted, args, tokens))
    ids = [entry.id for entry in files.vocabulary.entries]
    assert ids == [*reversed(TOKENS[:197]), "<pad>", "<cls>", "<eoc>"]
    name = "backbone.gene_embedding.embedding.weight"
    row_of = {entry.id: i for i, entry in enumerate(published.vocabulary.entries)}
    assert torch.equal(weights[name], expected[name][[row_of[token] for token in ids]])
    assert files.training_data["converted"]["rows"] == [199, 197, 198, *range(197)]


def test_missing_special_tokens_are_appended_as_far_as_there_are_rows(tiny: Path) -> None:
    vocab = tiny / "vocab.json"
    _, expected, _ = read_scgpt(tiny)
    vocab.write_text(json.dumps({token: i for i, token in enumerate(TOKENS[:197])}))
    files, weights, _ = read_scgpt(tiny)
    assert [entry.id for entry in files.vocabulary.entries] == TOKENS
    assert same(weights, expected)
    assert [entry.id for entry in read_tokens(vocab, 199).vocabulary.entries] == TOKENS[:199]
    with pytest.raises(ScfmError, match=r"has no <cls>, and its 197 tokens leave none of the 198 rows"):
        read_tokens(vocab, 198)


def test_a_vocabulary_of_another_length_is_a_misshapen_embedding(tiny: Path) -> None:
    longer = [*TOKENS[:197], "one more", *TOKENS[197:]]
    (tiny / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(longer)}))
    with pytest.raises(ScfmError, match=r"weight is \(200, 32\), expected \(201, 32\): the vocabulary has 201 tokens"):
        read_scgpt(tiny)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"A": 0, "B": 2}', r"without gaps, but 1 is missing"),
        ('{"A": 0, "B": 0}', r"ids stand for several tokens"),
        ('{"A": 0, "A": 1}', r"stand there more than once"),
        ('{"A": "0"}', r"whole numbers"),
        ("[1, 2]", r"expected \{token: id\}"),
        ("{", r"not JSON"),
    ],
)
def test_broken_vocabularies_are_refused(tiny: Path, content: str, message: str) -> None:
    (tiny / "vocab.json").write_text(content)
    with pytest.raises(ScfmError, match=rf"vocab\.json: .*{message}"):
        read_scgpt(tiny)


def test_a_list_of_genes_is_numbered_as_scgpt_does(tmp_path: Path) -> None:
    (tmp_path / "genes.txt").write_text("TP53\nCD3D\nACTB\nCD3D\n")
    tokens = read_tokens(tmp_path / "genes.txt", 6)
    assert tokens.names == ["CD3D", "ACTB", "TP53", "<pad>", "<cls>", "<eoc>"]


def test_ensembl_ids_of_tokens_and_of_a_table(tmp_path: Path) -> None:
    tokens = ["CD3D", "ENSG00000141510", "ENSG00000283886", "ENSG00000283886.3", "TP53", "GONE", "TWIN1", "TWIN2"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    table = {"CD3D": "ENSG00000167286", "TP53": "ENSG00000141510", "TWIN1": "ENSG7", "TWIN2": "ENSG7"}
    read = read_tokens(tmp_path / "vocab.json", 11, table)
    known = {entry.id: entry.ensembl for entry in read.vocabulary.entries}
    assert known["CD3D"] == "ENSG00000167286"
    assert known["TP53"] is None  # another token is that id
    assert known["GONE"] is known["TWIN1"] is known["TWIN2"] is None
    assert known["ENSG00000141510"] == "ENSG00000141510"
    assert read.names == [*tokens, "<pad>", "<cls>", "<eoc>"]
    column = read.vocabulary.match(["ENSG00000167286", None, "ENSG00000283886.7"], ["", "CD3D", None])
    assert column.tolist() == [0, 0, 2]


def test_tokens_for_scgpt_are_symbols_where_these_are_unique() -> None:
    vocabulary = Vocabulary(
        [
            Gene.of("ENSG00000167286", "CD3D"),
            Gene.of("ENSG00000000001", "TWIN"),
            Gene.of("ENSG00000000002", "TWIN"),
            Gene.of("ENSG00000000003", None),
            Gene.of(None, "ACTB"),
            Gene("<pad>"),
            Gene("<cls>"),
        ]
    )
    assert names_of(vocabulary) == [
        "CD3D",
        "ENSG00000000001",
        "ENSG00000000002",
        "ENSG00000000003",
        "ACTB",
        "<pad>",
        "<cls>",
    ]
