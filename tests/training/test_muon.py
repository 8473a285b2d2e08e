"""Muon for the matrices of the blocks, AdamW for all else, and the two as one optimizer."""

from __future__ import annotations

import io
from copy import deepcopy
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from runs import tiny_recipe, write_shards
from torch import Tensor, nn

from scfm.checkpoints.native import read_weights
from scfm.data.shards import open_shards
from scfm.data.tokens import Tokeniser
from scfm.errors import ScfmError
from scfm.metrics_file import read_metrics
from scfm.model import ScGPT
from scfm.model.heads import HeadSpec
from scfm.objectives import build_objectives
from scfm.recipe import ModelConfig, OptimizerConfig, Recipe
from scfm.training.datamodule import CellDataModule
from scfm.training.module import FoundationModule
from scfm.training.muon import JoinedOptimizer
from scfm.training.optimizers import build_optimizer, build_schedule
from scfm.training.run import pretrain, token_config

WIDTH, HIDDEN = 8, 12
MUON = OptimizerConfig("muon", lr=0.1, weight_decay=0.1)


def made_up_network() -> ScGPT:
    torch.manual_seed(0)
    config = ModelConfig(width=WIDTH, heads=2, layers=2, hidden=HIDDEN)
    return ScGPT(config, 20, 0, 5, {}, {}, [HeadSpec("gep", "gep"), HeadSpec("gepc", "gepc")])


def set_gradients(network: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)


def of_muon(name: str) -> bool:
    return ".blocks." in name and name.endswith(("qkv.weight", "proj.weight", "linear1.weight", "linear2.weight"))


def test_matrices_of_blocks_are_turned_and_all_else_is_not() -> None:
    network = made_up_network()
    optimizer = build_optimizer(network, MUON, fused=True)
    joint, single, decays, spared = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    for name, parameter in network.named_parameters():
        if of_muon(name):
            assert id(parameter) in (joint if "qkv" in name else single), name
        else:
            embedding_or_vector = parameter.ndim < 2 or "embedding" in name
            assert id(parameter) in (spared if embedding_or_vector else decays), name
    assert len(joint) == 2
    assert len(single) == 6
    assert sum(map(len, (joint, single, decays, spared))) == len(list(network.parameters()))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.1, 0.0]
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}


def test_steps_equal_those_of_torch_by_hand() -> None:
    """q, k and v as matrices of their own under torch's Muon, all else under AdamW, one schedule over both."""
    ours, theirs = made_up_network(), made_up_network()
    optimizer = build_optimizer(ours, MUON, fused=True)
    schedule = build_schedule(optimizer, MUON, total_steps=5, epoch_steps=5)
    cut: list[tuple[Tensor, nn.Parameter]] = []
    whole: list[nn.Parameter] = []
    decays, spared = [], []
    for name, parameter in theirs.named_parameters():
        if "qkv.weight" in name:
            cut += [(piece, nn.Parameter(piece.detach().clone())) for piece in parameter.split(WIDTH)]
        elif of_muon(name):
            whole.append(parameter)
        else:
            (spared if parameter.ndim < 2 or "embedding" in name else decays).append(parameter)
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
    by_hand = [
        torch.optim.Muon(
            [*whole, *(p for _, p in cut)], lr=0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(groups, lr=0.1, fused=True),
    ]
    schedules = [build_schedule(each, MUON, total_steps=5, epoch_steps=5) for each in by_hand]
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        joint = [p.grad for name, p in theirs.named_parameters() if "qkv.weight" in name]
        for (_, piece), gradient in zip(cut, (g for grad in joint for g in grad.split(WIDTH)), strict=True):
            piece.grad = gradient
        for each in [optimizer, *by_hand]:
            each.step()
        for each in [schedule, *schedules]:
            each.step()
    with torch.no_grad():
        for view, piece in cut:
            view.copy_(piece)
    start = made_up_network()
    for (name, a), b, c in zip(ours.named_parameters(), theirs.parameters(), start.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name


def test_a_saved_state_continues_to_the_bit() -> None:
    network = made_up_network()
    optimizer = build_optimizer(network, MUON, fused=True)
    for step in range(2):
        set_gradients(network, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = deepcopy(network)
    resumed = build_optimizer(again, MUON, fused=True)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    schedules = [build_schedule(each, MUON, total_steps=5, epoch_steps=5) for each in (optimizer, resumed)]
    for step in range(2, 4):
        for each, one, schedule in zip((network, again), (optimizer, resumed), schedules, strict=True):
            set_gradients(each, step)
            one.step()
            one.zero_grad(set_to_none=True)
            assert all(p.grad is None for p in each.parameters())
            schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    assert len(resumed.state_dict()["state"]) == len(list(network.parameters()))


def test_frozen_blocks_are_refused_and_frozen_rest_is_not() -> None:
    network = made_up_network()
    for name, parameter in network.named_parameters():
        parameter.requires_grad = of_muon(name)
    assert [group["stacked"] for group in build_optimizer(network, MUON, fused=True).param_groups] == [3, 1]
    for parameter in network.backbone.blocks.parameters():
        parameter.requires_grad = False
    with pytest.raises(ScfmError, match=r"optimizer\.name: muon trains the matrices .* none is trainable"):
        build_optimizer(network, MUON, fused=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("cells") / "shards")


def recipe_for(shards: Path, out: Path, name: str = "muon") -> Recipe:
    return tiny_recipe(
        shards,
        out,
        optimizer={"name": name, "weight_decay": 0.1, "warmup": 3},
        trainer={"max_steps": 9, "log_every_n_steps": 1},
        checkpoint={"every_steps": 4},
        data={"tokens_per_pack": 200},
    )


def test_a_resumed_run_is_the_unbroken_one_and_another_optimizer_cannot_resume(shards: Path, tmp_path: Path) -> None:
    unbroken = read_weights(pretrain(recipe_for(shards, tmp_path / "run")))
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.csv") if row[1] in ("train/loss", "valid/loss")]
    checkpoint = str(tmp_path / "run" / "checkpoints" / "step=000000004.ckpt")
    with pytest.raises(ScfmError, match=r"optimizer\.name: the checkpoint was trained with muon, .* names adamw"):
        pretrain(recipe_for(shards, tmp_path / "run", "adamw"), resume=checkpoint)
    resumed = read_weights(pretrain(recipe_for(shards, tmp_path / "run"), resume=checkpoint))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in unbroken.items())
    again = [row for row in read_metrics(tmp_path / "run" / "metrics.csv") if row[1] in ("train/loss", "valid/loss")]
    assert again == rows


def test_a_gradient_scaler_unscales_before_the_clipping_and_skips_what_overflows(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both parts see true gradients; after an overflow neither moves."""
    norms: list[float] = []
    clip = FoundationModule.on_before_optimizer_step

    def watch(module: FoundationModule, optimizer: torch.optim.Optimizer) -> None:
        trained = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(trained)))
        clip(module, optimizer)

    monkeypatch.setattr(FoundationModule, "on_before_optimizer_step", watch)
    recipe = recipe_for(shards, Path("unused"))
    store = open_shards(shards)
    objectives = build_objectives(recipe.objectives, n_bins=recipe.data.n_bins)
    for kind, scale in (("plain", None), ("scaled", 16.0), ("overflowing", 2.0**127)):
        torch.manual_seed(0)
        heads = list({head.task: head for objective in objectives for head in objective.heads()}.values())
        config = ModelConfig(width=16, heads=2, layers=1, hidden=16, dropout=0.0)
        network = ScGPT(config, len(store.vocabulary), store.vocabulary.pad, 51, {}, {}, heads)
        module = FoundationModule(network, objectives, OptimizerConfig("muon", lr=1e-3))
        tokeniser = Tokeniser(token_config(recipe), store.vocabulary, store.value_kind)
        data = CellDataModule(store, tokeniser, recipe.data, range(120), range(0), {}, seed=0)
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        precision = MixedPrecision("16-mixed", "cpu", scaler) if scaler else None
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = L.Trainer(accelerator="cpu", max_steps=1, plugins=precision, **quiet)
        start = deepcopy(network)
        trainer.fit(module, data)
        assert isinstance(trainer.optimizers[0], JoinedOptimizer)
        moved = [not torch.equal(a, b) for a, b in zip(start.parameters(), network.parameters(), strict=True)]
        assert any(moved) == (kind != "overflowing")
    assert norms[1] == pytest.approx(norms[0], rel=0.02)
    assert not norms[2] < float("inf")
