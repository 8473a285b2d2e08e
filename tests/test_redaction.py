"""Secrets are taken out of what is printed, logged and saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from scfm.cli import main
from scfm.recipe import Recipe
from scfm.redaction import redacted, without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKIA123:s3cr/et@bucket/shards", "s3://***@bucket/shards"),
        ("http://host:8080/cells@v1.h5ad", "http://host:8080/cells@v1.h5ad"),
        ("s3://bucket/cells@v1", "s3://bucket/cells@v1"),
        ("s3://AKIA123:s3cret@bucket/shards", "s3://***@bucket/shards"),
        ("https://hf_token@huggingface.co/x: not found", "https://***@huggingface.co/x: not found"),
        ("https://h/x?X-Amz-Signature=abc&part=1", "https://h/x?X-Amz-Signature=***&part=1"),
        ("https://h/x?sig=a%2Fb&se=2026 is no directory", "https://h/x?sig=***&se=2026 is no directory"),
        ("https://h/x?access_token=abc#top", "https://h/x?access_token=***#top"),
        ("s3://bucket/shards?region=eu", "s3://bucket/shards?region=eu"),
        ("/data/token=3/key@home.h5ad", "/data/token=3/key@home.h5ad"),
        ("write to someone@example.org", "write to someone@example.org"),
    ],
)
def test_secrets_in_urls(text: str, shown: str) -> None:
    assert redacted(text) == shown


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"])
def test_values_of_variables_that_hold_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "hf_abcdefgh")
    assert redacted("refused: hf_abcdefgh is not known") == "refused: *** is not known"
    monkeypatch.setenv(name, "true")  # no key, but an ordinary word
    assert redacted("this is true") == "this is true"


def test_other_variables_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCFM_SHARED", "/work/shared")
    assert redacted("/work/shared/data") == "/work/shared/data"


def test_nested_content() -> None:
    nested = {"data": {"shards": "s3://k:v@b"}, "list": [1, "https://t@h"], "n": None}
    assert without_secrets(nested) == {"data": {"shards": "s3://***@b"}, "list": [1, "https://***@h"], "n": None}
    assert nested["data"] == {"shards": "s3://k:v@b"}


def test_a_saved_recipe_holds_none(tmp_path: Path) -> None:
    recipe = Recipe()
    recipe.data.shards = "s3://key:s3cret@bucket/shards"
    recipe.save(tmp_path / "recipe.yaml")
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["data"]["shards"] == "s3://***@bucket/shards"
    assert recipe.data.shards == "s3://key:s3cret@bucket/shards"


def test_error_messages_hold_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "https://user:s3cret@host/cells.h5ad?token=s3cret", "--out", "x"]) == 2
    said = capsys.readouterr().err
    assert "host/cells.h5ad" in said
    assert "s3cret" not in said
