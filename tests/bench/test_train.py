"""The benchmark of training: runs the real steps, on shards and on synthetic cells, with little installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs import tiny_recipe, write_shards

from scfm.bench.cells import DISTINCT_CELLS, synthetic_store
from scfm.bench.train import Windows, bench_train, endless, train
from scfm.errors import ScfmError
from scfm.recipe import DataConfig, ModelConfig, ObjectiveConfig, Recipe, TrainerConfig
from scfm.training.throughput import Throughput

TIMES = {"steps": 2, "repeats": 3, "warmup": 1}
RATES = ("tflops", "mfu", "ceiling_tflops", "peak_memory_gb", "cells_per_cpu_second")


def recipe(precision: str = "32", **model: object) -> Recipe:
    return Recipe(
        data=DataConfig(cells_per_batch=8, tokens_per_pack=200, max_genes=30, fill_packs=True),
        model=ModelConfig(width=16, heads=2, layers=1, hidden=16, **model),
        objectives=[ObjectiveConfig("gep"), ObjectiveConfig("cell_prompt", start_step=1000)],
        trainer=TrainerConfig(accelerator="cpu", devices=1, precision=precision, max_epochs=3),
    )


def test_train_prints_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "train.json"
    train(recipe(cell_conditions=["batch"]), **TIMES, genes=25, vocabulary=50, out=str(out))
    result = json.loads(out.read_text())
    printed = capsys.readouterr()
    assert json.loads(printed.out) == result
    assert printed.err.startswith("train: ")
    assert result["bench"] == "train"
    for name in ("cells_per_second", "tokens_per_second"):
        assert result[name]["best"] >= result[name]["median"] > 0
    assert all(result[name] > 0 for name in RATES)
    assert 0 <= result["data_wait"] < 1
    assert 0 <= result["empty"] < 0.5
    assert 10 < result["tokens_per_second"]["median"] / result["cells_per_second"]["median"] <= 31
    assert result["attention"]["backend"] == "flash_cpu"
    assert result["vocabulary"] == 52
    assert {"commit", "versions", "device", "compile", "data", "model", "objectives"} <= result.keys()
    assert list(tmp_path.iterdir()) == [out]  # no run directory


@pytest.mark.parametrize(("given", "ran"), [("32", "32-true"), ("bf16-mixed", "bf16-mixed")])
def test_precision_is_honoured(given: str, ran: str) -> None:
    assert bench_train(recipe(given), steps=1, repeats=1, warmup=1, genes=25, vocabulary=50)["precision"] == ran


def test_shards_are_read_in_place_of_synthetic_cells(tmp_path: Path) -> None:
    result = bench_train(tiny_recipe(write_shards(tmp_path / "shards"), tmp_path / "run"), steps=4, repeats=3)
    assert result["data"]["shards"] == str(tmp_path / "shards")
    assert result["genes_per_synthetic_cell"] is None
    assert not (tmp_path / "run").exists()


def test_windows_are_as_many_and_as_long_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    read = Throughput.figures
    monkeypatch.setattr(
        Throughput,
        "figures",
        lambda self, trainer, module: steps.append(trainer.global_step) or read(self, trainer, module),
    )
    kept: list[Windows] = []
    start = Windows.__init__
    monkeypatch.setattr(Windows, "__init__", lambda self, *given: kept.append(self) or start(self, *given))
    bench_train(recipe(), **TIMES, genes=25, vocabulary=50)
    assert steps == [1, 3, 5, 7]
    assert len(kept[0].figures) == 3


def test_all_objectives_count_and_nothing_else_happens() -> None:
    run = endless(recipe(), 7)
    assert (run.trainer.max_steps, run.trainer.max_epochs, run.data.valid_fraction) == (7, None, 0)
    assert [objective.start_step for objective in run.objectives] == [0, 0]


def test_synthetic_cells_repeat_themselves_without_memory() -> None:
    store = synthetic_store(2 * DISTINCT_CELLS + 5, genes=3, vocabulary=9, obs=["batch"])
    assert store.n_cells == 2 * DISTINCT_CELLS + 5 == len(store.obs["batch"].codes)
    assert store.blocks[0] is store.blocks[1]
    assert store.blocks[2].n_cells == 5
    assert store.vocabulary.n_genes == 9


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ScfmError, match="--steps: 0 must be at least 1"):
        bench_train(recipe(), steps=0)
    asked = recipe()
    asked.data.gene_conditions = {"pathway": "genes.tsv"}
    with pytest.raises(ScfmError, match=r"data\.gene_conditions: names real genes"):
        bench_train(asked)


BARE = """
import sys
for name in "pyarrow pandas anndata scanpy datasets sklearn jsonargparse safetensors h5py wandb einops".split():
    sys.modules[name] = None
from scfm.bench.train import bench_train
from scfm.recipe import DataConfig, ModelConfig, ObjectiveConfig, Recipe, TrainerConfig
recipe = Recipe(
    data=DataConfig(cells_per_batch=8, tokens_per_pack=200, max_genes=30),
    model=ModelConfig(width=16, heads=2, layers=1, hidden=16),
    objectives=[ObjectiveConfig("gep"), ObjectiveConfig("gepc")],
    trainer=TrainerConfig(accelerator="cpu", devices=1),
)
result = bench_train(recipe, steps=1, repeats=2, warmup=1, genes=25, vocabulary=50)
from scfm.evaluation.provenance import provenance
provenance()
print(result["cells_per_second"]["median"])
"""


def test_synthetic_cells_need_torch_numpy_numba_and_lightning_only() -> None:
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0
