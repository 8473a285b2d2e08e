"""scGPT's vocabulary rules, as stored from the original, through our reading of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scgpt_cases import OTHERWISE

from scfm.data.vocabulary_files import SCGPT_SPECIALS, read_vocabulary, scgpt_order, scgpt_tokens, vocabulary_of_tokens
from scfm.errors import ScfmError

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def rules(shared: Path) -> dict[str, Any]:
    OTHERWISE["gene_vocab"] = "exact"
    return json.loads((shared / "golden/scgpt/gene_vocab/config.json").read_text())


def by_id(id_of_token: dict[str, int]) -> list[str]:
    tokens = sorted(id_of_token, key=id_of_token.__getitem__)
    assert [id_of_token[token] for token in tokens] == list(range(len(tokens)))
    return tokens


def test_a_list_is_ordered_by_frequency_then_alphabetically(rules: dict[str, Any]) -> None:
    assert scgpt_order(rules["input_list"]) == by_id(rules["from_list"])


@pytest.mark.parametrize(("case", "first"), [("from_list_special_first", True), ("from_list_special_last", False)])
def test_specials_stand_before_or_after_the_list_in_their_own_order(
    rules: dict[str, Any], case: str, first: bool
) -> None:
    listed = [*rules["input_list"], "<cls>", "<cls>", "<cls>", "<cls>"]  # however often the list has them
    for tokens in (rules["input_list"], listed):
        assert scgpt_order(tokens, SCGPT_SPECIALS, specials_first=first) == by_id(rules[case])


def test_a_list_in_a_file_follows_the_same_rule(rules: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "genes.txt").write_text("\n".join(rules["input_list"]))
    vocabulary, ids = scgpt_tokens(tmp_path / "genes.txt")
    assert [entry.id for entry in vocabulary.entries] == by_id(rules["from_list_special_last"])
    assert ids.tolist() == list(range(10))


def test_missing_specials_are_appended(rules: dict[str, Any], tmp_path: Path) -> None:
    expected = rules["from_dict_appended"]
    given = {token: i for token, i in expected.items() if token not in SCGPT_SPECIALS}
    (tmp_path / "vocab.json").write_text(json.dumps(given))
    vocabulary, ids = scgpt_tokens(tmp_path / "vocab.json")
    assert {entry.id: i for entry, i in zip(vocabulary.entries, ids.tolist(), strict=True)} == expected
    assert read_vocabulary(tmp_path / "vocab.json") == vocabulary


def test_a_gap_in_the_ids_is_refused(rules: dict[str, Any], tmp_path: Path) -> None:
    assert rules["gap_in_ids"] == "RuntimeError"
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 2}')
    for read in (read_vocabulary, scgpt_tokens):
        with pytest.raises(ScfmError, match=r"vocab\.json: .*without gaps, but 1 is missing"):
            read(tmp_path / "vocab.json")


def test_an_unknown_gene_is_left_out_where_scgpt_looks_up_pad(rules: dict[str, Any]) -> None:
    """scGPT gives every unknown gene the id of `<pad>`: unless filtered, they all share one embedding that was never
    trained, and real expression enters the model as padding. Ours have no id, so they cannot enter at all."""
    vocabulary, ids = vocabulary_of_tokens(["a", "b"])
    assert ids[vocabulary.pad] == rules["oov_lookup_after_default_pad"]
    assert vocabulary.match([None, None], ["a", "unheard-of"]).tolist() == [0, -1]


def test_pad_is_found_wherever_it_stands(rules: dict[str, Any]) -> None:
    vocabulary, ids = vocabulary_of_tokens(by_id(rules["from_list_special_first"]))
    assert ids[vocabulary.pad] == rules["default_index_special_first"]
    assert [entry.id for entry in vocabulary.entries] == by_id(rules["from_list_special_last"])
    np.testing.assert_array_equal(ids, [*range(3, 10), 0, 1, 2])
