"""The model card: what a run knows, in words that hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from untrained import untrained_model

from scfm.checkpoints.card import RunFacts, model_card, shortened
from scfm.checkpoints.native import ModelFiles
from scfm.model.heads import HeadSpec
from scfm.recipe import ObjectiveConfig, Recipe
from scfm.training.run import majority_accuracy

FACTS = RunFacts(1234, 900, 100, "2 x NVIDIA H200")
METRICS = [
    (0, "probe/baseline_accuracy", 0.8),
    (10, "speed/step_seconds", 36.0),
    (10, "speed/validation_seconds", 40.0),
    (10, "valid/loss", 2.0),
    (10, "probe/accuracy", 0.75),
    (20, "speed/step_seconds", 32.0),
    (20, "valid/loss", 3.0),
]


def source(name: str, kept: int, donors: list[str], **provenance: Any) -> dict[str, Any]:
    return {"file": name, "kept": kept, "origins": {"donor_id": donors}, "provenance": provenance}


def files_of(**training_data: Any) -> ModelFiles:
    files = untrained_model().files
    files.training_data = training_data
    return files


def card_of(files: ModelFiles, facts: RunFacts = FACTS, **recipe: Any) -> str:
    made = Recipe(objectives=[ObjectiveConfig("gep")], **recipe)
    return model_card(made, files, METRICS, {}, facts)


def test_cells_time_and_machine() -> None:
    manifest = {
        "sources": [
            source("a.h5ad", 700, ["d1", "d2"], title="An atlas", citation="Doe | 2025", organisms=["NCBITaxon:9606"]),
            source("b.h5ad", 300, ["d2"]),
        ]
    }
    files = files_of(stage="pretraining", manifest=manifest)
    files.cell_hashes = np.zeros(1, np.uint64)
    card = card_of(files)
    for told in (
        "1,000 cells of 2 sources, 2 donors, organism Homo sapiens.",
        "| An atlas (a.h5ad); Doe \\| 2025 | 700 |",
        "| cells | 900 to train on, 100 held out to validate |",
        "| steps | 20, of 512 cells each: 11.4 times all cells |",
        "| time | 12 min |",
        "| hardware | 2 x NVIDIA H200 |",
        "cells.hash",
        "## Validation (held-out cells, step 10, the one exported)",
        "| probe/accuracy | 0.75 |",
        "| probe/baseline_accuracy: the same regression on log counts | 0.8 |",
        "It learned from 900 cells of Homo sapiens",
        "same donors and sources",
    ):
        assert told in card
    assert "2.0 |" not in card
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "unknown"
    assert head["library_name"] == "scfm"


def test_donors_that_were_held_out_are_no_limit() -> None:
    held_out = {"by": "donor_id", "groups": ["d2"], "cells": 100}
    card = card_of(files_of(manifest={"sources": [source("a.h5ad", 1000, ["d1", "d2"])], "held_out": held_out}))
    assert "whole groups of donor_id were held out to validate" in card
    assert "same donors and sources" not in card
    assert "cells.hash" not in card  # this model has none


def test_both_stages_of_a_fine_tuned_model_are_told() -> None:
    before = {"stage": "pretraining", "manifest": {"sources": [source(f"{i}.h5ad", 10, []) for i in range(40)]}}
    files = files_of(stage="fine-tuning", manifest={"sources": [source("mine.h5ad", 50, [])]}, pretraining=before)
    files.heads = [HeadSpec("annotation", "cls", 2, ["B cell", "T cell"])]
    card = card_of(files, from_model="/home/somebody/private/runs/pretrained/model")
    assert "fine-tuning: 50 cells of 1 source." in card
    assert "pretraining: 400 cells of 40 sources." in card
    assert "| 10 more, in training_data.json | 100 |" in card
    assert "| started from | .../runs/pretrained/model |" in card
    assert "somebody" not in card
    assert "adata = model.predict(adata)" in card


@pytest.mark.parametrize(("accuracy", "verdict"), [(0.9, "is above"), (0.4, "is NOT above")])
def test_labels_are_judged_beside_the_most_frequent(accuracy: float, verdict: str) -> None:
    recipe = Recipe(objectives=[ObjectiveConfig("cls")])
    metrics = [(5, "valid/loss", 1.0), (5, "valid/cls_accuracy", accuracy)]
    card = model_card(recipe, files_of(), metrics, {}, RunFacts(1, 9, 3, majority=0.5))
    assert f"The accuracy, {accuracy}, {verdict} that of the most frequent label, 0.5" in card
    assert "hardware" not in card


def test_the_most_frequent_label() -> None:
    labels = np.array([2, 2, 1, 1, 2, 0])
    assert majority_accuracy(labels, range(3), range(3, 6)) == pytest.approx(1 / 3)
    assert majority_accuracy(labels, range(6), range(0)) is None
    assert majority_accuracy(None, range(3), range(3, 6)) is None


def test_paths_of_the_machine_are_cut_short() -> None:
    assert shortened("/home/me/lab/runs/pretrained/model") == ".../runs/pretrained/model"
    assert shortened("runs/pretrained/model") == "runs/pretrained/model"
    assert shortened("org/name") == "org/name"
    assert shortened(str(Path("/data/model"))) == "/data/model"
