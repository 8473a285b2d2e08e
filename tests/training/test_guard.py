"""Updates that would ruin the weights are left out, told, and followed by a way back."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from runs import tiny_recipe, write_shards
from torch import Tensor, nn

from scfm.checkpoints.native import read_weights
from scfm.data.shards import open_shards
from scfm.errors import ScfmError
from scfm.metrics_file import read_metrics
from scfm.recipe import GuardConfig, ModelConfig, OptimizerConfig, Recipe
from scfm.training.guard import LEAST_DEVIATION, Guard
from scfm.training.module import FoundationModule, Metrics
from scfm.training.optimizers import build_optimizer
from scfm.training.run import modules_of, pretrain, pretraining_job
from scfm.training.saving import BackgroundCheckpoints

NAN = float("nan")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("cells") / "shards")


def guarded(shards: Path, out: Path, **sections: Any) -> Recipe:
    sections["trainer"] = {"max_steps": 12, "log_every_n_steps": 2} | sections.get("trainer", {})
    sections["checkpoint"] = {"every_steps": 4, "keep": 9} | sections.get("checkpoint", {})
    return tiny_recipe(shards, out, **sections)


def guard_of(**config: Any) -> Guard:
    return Guard(GuardConfig(**config), BackgroundCheckpoints(Path("unused"), 1), print, 1)


def spoil(monkeypatch: pytest.MonkeyPatch, steps: Collection[int], factor: float = NAN, rank: int = 0) -> None:
    """Multiply the loss of some steps in one process."""
    plain = FoundationModule.pack_losses

    def spoilt(self: FoundationModule, *args: Any) -> tuple[Tensor, Metrics]:
        loss, metrics = plain(self, *args)
        if self.training and self.global_step in steps and self.global_rank == rank:
            loss, metrics = loss * factor, metrics | {"loss": metrics["loss"] * factor}
        return loss, metrics

    monkeypatch.setattr(FoundationModule, "pack_losses", spoilt)


def left_out(run: Path, name: str = "guard/left_out") -> dict[int, float]:
    return {step: value for step, metric, value in read_metrics(run / "metrics.csv") if metric == name}


def same(one: Path, other: Path) -> bool:
    a, b = read_weights(one), read_weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_limit_is_a_robust_one() -> None:
    losses = np.random.default_rng(0).normal(2.0, 0.1, 9).astype(np.float32)
    losses[3] = 50.0  # an outlier moves neither median nor deviation much
    median = np.median(losses)
    expected = median + 5 * np.median(np.abs(losses - median))
    guard = guard_of(spike=5.0, window=9)
    assert float(guard.limit(torch.from_numpy(losses))) == pytest.approx(expected, rel=1e-6)
    assert float(guard.limit(torch.full((9,), 2.0))) == pytest.approx(2.0 * (1 + 5 * LEAST_DEVIATION))
    losses[0] = NAN  # not full yet
    assert np.isnan(float(guard.limit(torch.from_numpy(losses))))
    assert np.isnan(float(guard_of(spike=0.0, window=9).limit(torch.full((9,), 2.0))))


def test_what_is_judged_bad_joins_no_window() -> None:
    guard = guard_of(spike=5.0, window=4)

    def judge(loss: float, norm: float = 1.0, terms: tuple[str, ...] = ("gep",)) -> bool:
        return bool(guard.judge(0, torch.tensor(loss), torch.tensor(norm), terms))

    assert not any(judge(loss) for loss in (1.0, 50.0, 1.1, 0.9))  # too few to tell a spike
    assert [judge(loss) for loss in (30.0, 30.0, NAN, float("inf"), 1.0)] == [True, True, True, True, False]
    assert judge(1.0, norm=NAN)
    assert judge(1.0, norm=float("inf"))
    assert not judge(30.0, terms=("gep", "cell_prompt"))  # a new term: the loss is another one
    assert len(guard.unread) == 12


def test_a_judgement_waits_for_no_device() -> None:
    """On the meta device whatever is read back to the host raises."""
    guard, bad = guard_of(window=4), torch.empty(())
    for step in range(6):
        bad = guard.judge(step, torch.ones((), device="meta"), torch.ones((), device="meta"), ["gep"])
    assert bad.device.type == "meta"
    with pytest.raises(RuntimeError):
        bool(bad)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("first", [True, False], ids=["the first update", "a later one"])
def test_an_update_that_is_left_out_changes_nothing(name: str, first: bool) -> None:
    """Weights, momentum, second moments and step counts, as if the step had never been."""
    from scfm.model.transformer import Block

    def trained(spoilt: bool) -> tuple[list[Tensor], dict[str, Any]]:
        torch.manual_seed(0)
        network = nn.Sequential(Block(ModelConfig(width=8, heads=2, hidden=8)), nn.Linear(8, 1))
        optimizer = build_optimizer(network, OptimizerConfig(name, lr=0.1, weight_decay=0.1), fused=True)
        guard = guard_of()
        draw = torch.Generator().manual_seed(1)
        gradients = [[torch.randn(p.shape, generator=draw) for p in network.parameters()] for _ in range(3)]
        steps = [(gradient, False) for gradient in gradients]
        if spoilt:
            steps.insert(0 if first else 2, ([torch.full_like(g, NAN) for g in gradients[0]], True))
        for gradient, bad in steps:
            for parameter, given in zip(network.parameters(), gradient, strict=True):
                parameter.grad = given.clone()
            guard.apply(optimizer, torch.tensor(float(bad)), scaled=False)
            optimizer.step()
        return [p.detach() for p in network.parameters()], optimizer.state_dict()["state"]

    (weights, state), (expected, expected_state) = trained(True), trained(False)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    assert state.keys() == expected_state.keys()
    for index, entries in expected_state.items():
        assert all(torch.equal(state[index][key], value) for key, value in entries.items())


def test_under_a_gradient_scaler_the_gradient_is_dropped() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    for bad in (1.0, 0.0):
        weight.grad = torch.ones(2)
        guard_of().apply(optimizer, torch.tensor(bad), scaled=True)
        assert (weight.grad is None) == bool(bad)


@pytest.mark.parametrize(("scale", "bad", "counted"), [(16.0, [2], 1), (2.0**127, [], 4)], ids=["loss", "overflow"])
def test_a_run_with_a_gradient_scaler_counts_its_skips_too(
    shards: Path, monkeypatch: pytest.MonkeyPatch, scale: float, bad: list[int], counted: int
) -> None:
    spoil(monkeypatch, bad)
    recipe, guard = guarded(shards, Path("unused")), guard_of()
    module, data = modules_of(pretraining_job(recipe, open_shards(shards)), guard)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    L.Trainer(accelerator="cpu", max_steps=4, plugins=precision, callbacks=[guard], **quiet).fit(module, data)
    assert guard.left_out == counted
    moved = [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
    assert any(moved) == (counted < 4)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_a_run_leaves_out_what_is_not_finite_and_spikes(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, [5])
    spoil(monkeypatch, [9], factor=1e4)
    recipe = guarded(shards, tmp_path / "run", guard={"window": 3, "spike": 500.0})
    weights = read_weights(pretrain(recipe))
    assert all(tensor.isfinite().all() for tensor in weights.values() if tensor.is_floating_point())
    assert left_out(tmp_path / "run") == {6: 1, 10: 2}
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "step 6: update left out (not finite: loss nan, gradient nan), batch 6 of 6, epoch 1" in log
    assert "step 10: update left out (its loss " in log
    assert ", batch 4 of 6, epoch 2" in log
    checkpoint = str(tmp_path / "run" / "checkpoints" / "step=000000008.ckpt")
    resumed = read_weights(pretrain(recipe, resume=checkpoint))
    assert left_out(tmp_path / "run") == {6: 1, 10: 2}
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())


@pytest.mark.distributed
def test_all_processes_leave_the_same_updates_out(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = []
    for rank in (0, 1):
        with monkeypatch.context() as patch:
            spoil(patch, [3], rank=rank)
            two = {"devices": 2, "strategy": "ddp_fork", "max_steps": 6}
            models.append(pretrain(guarded(shards, tmp_path / str(rank), trainer=two)))
        assert left_out(tmp_path / str(rank)) == {4: 1}
    assert same(*models)


class Watched:
    """Remembers the weights as a run goes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.weights: dict[int, Tensor] = {}
        self.rates: dict[int, float] = {}
        plain: Callable[..., None] = FoundationModule.training_step

        def watched(module: FoundationModule, *args: Any) -> None:
            self.weights[module.global_step] = torch.cat([p.detach().flatten() for p in module.network.parameters()])
            self.rates[module.global_step] = module.trainer.optimizers[0].param_groups[0]["lr"]
            plain(module, *args)

        monkeypatch.setattr(FoundationModule, "training_step", watched)


def test_many_in_a_row_send_the_weights_back_and_the_batches_on(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 9 to 12 (by index 8 to 11) are bad: no checkpoint then, and the weights of step 8 are those of now."""
    plain = Watched(monkeypatch)
    pretrain(guarded(shards, tmp_path / "plain", trainer={"max_steps": 16}))
    spoil(monkeypatch, range(8, 12))
    seen = Watched(monkeypatch)
    recipe = guarded(shards, tmp_path / "run", trainer={"max_steps": 16}, guard={"patience": 3})
    pretrain(recipe)
    assert torch.equal(seen.weights[11], plain.weights[8])
    assert torch.equal(seen.weights[12], plain.weights[4])
    assert not torch.equal(seen.weights[13], seen.weights[12])
    assert seen.rates == plain.rates
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "step 12: 4 updates in a row were left out; weights and optimizer go back to " in log
    assert "step=000000004.ckpt, the batches go on" in log
    assert left_out(tmp_path / "run", "guard/rollbacks") == {12: 1}
    assert [path.stem for path in sorted((tmp_path / "run" / "checkpoints").glob("step=*"))] == [
        f"step={step:09d}" for step in (4, 8, 12)
    ]


def test_it_gives_up_where_nothing_helps(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, range(6, 100))
    recipe = guarded(shards, tmp_path / "run", trainer={"max_steps": 40}, guard={"patience": 3, "rollbacks": 2})
    with pytest.raises(ScfmError, match=r"step 18: 4 updates in a row .* gone back 2 times already.*optimizer\.lr"):
        pretrain(recipe)
    assert left_out(tmp_path / "run", "guard/rollbacks") == {10: 1, 14: 2}


def test_without_a_checkpoint_there_is_no_way_back(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, range(1, 100))
    with pytest.raises(ScfmError, match="step 4: 3 updates in a row were left out, and there is no checkpoint"):
        pretrain(guarded(shards, tmp_path / "run", guard={"patience": 3}))
