"""Two processes train as one does: the same global batches, losses and weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from runs import tiny_recipe, write_shards
from scbert_runs import SCBERT, scbert_recipe
from torch import Tensor

from scfm.checkpoints.native import read_weights
from scfm.data.shards import open_shards
from scfm.metrics_file import read_metrics
from scfm.training.launch import build_trainer
from scfm.training.run import modules_of, pretrain, pretraining_job

pytestmark = pytest.mark.distributed

SMOOTH = {"lr": 1e-2, "eps": 1e-2}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("cells") / "shards")


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


DOMAINS = {"input_norm": "domain", "domain": "batch", "cell_conditions": ["batch"]}


@pytest.mark.parametrize(
    ("objectives", "model"),
    [
        ([{"name": "gep"}, {"name": "gepc"}, {"name": "cell_prompt", "start_step": 3}], {}),
        ([{"name": "gep", "loss": "cross_entropy"}, {"name": "ecs", "weight": 10.0}], {}),
        (
            [
                {"name": "gep", "nonzero": True},
                {"name": "gepc", "nonzero": True, "start_step": 2},
                {"name": "dar", "condition": "batch", "start_step": 3},
                {"name": "cce"},
            ],
            DOMAINS,
        ),
    ],
    ids=["pretraining", "with-ecs", "with-domains"],
)
@pytest.mark.parametrize("tokens_per_pack", [60, 5000], ids=["many-packs", "one-pack-each"])
def test_two_processes_equal_one(
    shards: Path, tmp_path: Path, objectives: list[dict[str, object]], model: dict[str, object], tokens_per_pack: int
) -> None:
    common = {"objectives": objectives, "model": {"dropout": 0.0} | model, "optimizer": SMOOTH}
    data = {"tokens_per_pack": tokens_per_pack}
    two = {"devices": 2, "strategy": "ddp_fork", "log_every_n_steps": 1}
    one = tiny_recipe(shards, tmp_path / "one", **common, data=data, trainer={"log_every_n_steps": 1})
    both = tiny_recipe(shards, tmp_path / "two", **common, data=data, trainer=two)
    assert largest_difference(read_weights(pretrain(one)), read_weights(pretrain(both))) < 2e-5
    losses = [
        {
            row[:2]: row[2]
            for row in read_metrics(tmp_path / run / "metrics.csv")
            if row[1] in ("train/loss", "valid/loss")
        }
        for run in ("one", "two")
    ]
    assert len(losses[0]) == 6 + 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("tokens_per_pack", [150, 5000], ids=["many-packs", "one-pack-each"])
def test_scbert_on_two_processes_with_features_drawn_on_the_way(
    shards: Path, tmp_path: Path, tokens_per_pack: int
) -> None:
    """Both draw the same features at the same steps, and none of them is told by the other."""
    performer = SCBERT["model"]["performer"] | {"redraw_every": 2}
    common = {"model": {"performer": performer}, "optimizer": SMOOTH, "data": {"tokens_per_pack": tokens_per_pack}}
    two = {"devices": 2, "strategy": "ddp_fork"}
    one = read_weights(pretrain(scbert_recipe(shards, tmp_path / "one", **common)))
    both = read_weights(pretrain(scbert_recipe(shards, tmp_path / "two", **common, trainer=two)))
    assert largest_difference(one, both) < 2e-5
    kept = {"model": {"performer": performer | {"redraw_every": 0}}}
    started = read_weights(pretrain(scbert_recipe(shards, tmp_path / "kept", **common | kept)))
    drawn = "backbone.blocks.0.mixer.projection"
    assert float((one[drawn] - started[drawn]).abs().max()) > 0.1


class SameFeatures(L.Callback):
    """Fails where two processes trained a step with different features; counts the draws."""

    def __init__(self) -> None:
        self.draws = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        mine = pl_module.network.backbone.blocks[1].mixer.projection.clone()
        everyone = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(everyone, mine)
        assert torch.equal(everyone[0], everyone[1])
        self.draws += int(hasattr(self, "last") and not torch.equal(self.last, mine))
        self.last = mine

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        assert self.draws >= 2


def test_compat_draws_alike_in_every_process(shards: Path, tmp_path: Path) -> None:
    """It counts forward passes, of which every process takes as many as the others."""
    form = {"performer": SCBERT["model"]["performer"] | {"mode": "compat", "redraw_every": 5}}
    two = {"devices": 2, "strategy": "ddp_fork"}
    recipe = scbert_recipe(shards, tmp_path / "run", model=form, trainer=two, data={"tokens_per_pack": 150})
    module, data = modules_of(pretraining_job(recipe, open_shards(shards), shuffled=True))
    build_trainer(recipe, callbacks=[SameFeatures()], logger=False, enable_checkpointing=False).fit(module, data)


def test_resuming_on_two_processes_what_one_began(shards: Path, tmp_path: Path) -> None:
    still = {"model": {"dropout": 0.0}, "optimizer": SMOOTH}
    whole = read_weights(pretrain(tiny_recipe(shards, tmp_path / "whole", **still)))
    begun = tiny_recipe(shards, tmp_path / "run", **still)
    pretrain(begun)
    two = {"devices": 2, "strategy": "ddp_fork"}
    checkpoint = tmp_path / "run" / "checkpoints" / "step=000000004.ckpt"
    resumed = read_weights(
        pretrain(tiny_recipe(shards, tmp_path / "run", **still, trainer=two), resume=str(checkpoint))
    )
    assert largest_difference(whole, resumed) < 2e-5


def test_muon_on_two_processes_and_resumed_on_one(shards: Path, tmp_path: Path) -> None:
    """Muon turns bfloat16 copies of the gradients: rounding of the sums over ranks shows more than under AdamW."""
    still = {"model": {"dropout": 0.0}, "optimizer": {"name": "muon", "lr": 1e-3, "eps": 1e-2}}
    whole = read_weights(pretrain(tiny_recipe(shards, tmp_path / "whole", **still)))
    two = {"devices": 2, "strategy": "ddp_fork"}
    both = pretrain(tiny_recipe(shards, tmp_path / "run", **still, trainer=two))
    assert largest_difference(whole, read_weights(both)) < 1e-4
    checkpoint = tmp_path / "run" / "checkpoints" / "step=000000004.ckpt"
    resumed = pretrain(tiny_recipe(shards, tmp_path / "run", **still), resume=str(checkpoint))
    assert largest_difference(whole, read_weights(resumed)) < 1e-4


def test_the_command_line_starts_its_own_processes(shards: Path, tmp_path: Path) -> None:
    """Without fork: each rank is a process that runs the same command, as on GPUs."""
    tiny_recipe(shards, tmp_path / "run", trainer={"devices": 2}).save(tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "scfm.cli", "pretrain", "--config", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
