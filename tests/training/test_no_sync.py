"""A training step never makes the host wait for the GPU: else the GPU idles while the host catches up.

Where there is no GPU, a step runs on the meta device: its tensors hold nothing, so whatever would read one back to the
host raises (`.item()`, a boolean mask as index, `nonzero` ...), and copies to the device are watched for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from runs import tiny_recipe, write_shards
from scbert_runs import SCBERT, scbert_recipe
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import scfm.model.scgpt as scgpt
from scfm.checkpoints.native import ModelFiles
from scfm.data.batch import PackedBatch
from scfm.data.shards import open_shards
from scfm.data.tokens import Tokeniser
from scfm.model.attention import AttentionLayout, block_mask
from scfm.objectives import build_objectives
from scfm.recipe import Recipe
from scfm.training.datamodule import CellDataModule
from scfm.training.launch import build_trainer, quieten
from scfm.training.module import FoundationModule
from scfm.training.run import token_config

PRETRAINING = [{"name": "gep"}, {"name": "gepc"}, {"name": "cell_prompt"}]
NAMES = {"batch": ["batch0", "batch1"]}
LABELS = ["B cell", "NK cell", "T cell"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("cells") / "shards")


def assembled(recipe: Recipe, shards: Path) -> tuple[FoundationModule, CellDataModule]:
    """Return what a run trains and its filled packs, with a label and a domain for every cell."""
    store = open_shards(shards)
    weights = torch.tensor([0.5, 1.0, 1.5])
    objectives = build_objectives(recipe.objectives, recipe.data.n_bins, LABELS, weights, NAMES)
    heads = list({head.task: head for objective in objectives for head in objective.heads()}.values())
    files = ModelFiles(recipe.model, token_config(recipe), "counts", store.vocabulary, heads, cell_conditions=NAMES)
    codes = {"batch": store.obs["batch"].codes, "label": store.obs["cell_type"].codes}
    conditions = {name: np.asarray(column, np.int64) for name, column in codes.items()}
    tokeniser = Tokeniser(files.tokens, store.vocabulary, store.value_kind)
    data = CellDataModule(store, tokeniser, recipe.data, range(120), range(0), conditions, seed=0)
    return FoundationModule(files.build().train(), objectives, recipe.optimizer), data


class NoCopies(TorchDispatchMode):
    """Refuses what would copy from the host in mid-step; a number among the operands of arithmetic is no copy."""

    moving = ("aten::_to_copy", "aten::copy_", "aten::index_put", "aten::index_put_")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = {x.device.type for x in tree_leaves(result) if isinstance(x, Tensor)}
        if func._schema.name in self.moving and "cpu" in given and "meta" in given | made:
            raise AssertionError(f"{func} copies from the host")
        return result


def step_on_meta(module: FoundationModule, packs: Sequence[PackedBatch]) -> None:
    """Take the passes of a training step, its losses, their gradients and the clipping."""
    packs, active = list(packs), module.objectives
    norms = module.measure_norms(packs, active)
    metrics, pulls = module.global_losses(packs, active, norms)
    for index, pack in enumerate(packs):
        output = module.look(pack, index, norms)
        loss, _ = module.pack_losses(pack, output, active)
        for view, pull in enumerate(pulls):
            output = module.look(pack, index, norms, view) if view else output
            loss = loss + (output.cell * pull[index]).sum()
        loss.backward()
    module.pull_norms(norms)
    torch.nn.utils.clip_grad_norm_(module.network.parameters(), 1.0)
    assert all(metric.device.type == "meta" for metric in metrics.values())


@pytest.mark.parametrize(
    ("objectives", "model"),
    [
        ([*PRETRAINING, {"name": "ecs"}], {}),
        ([{"name": "gep", "loss": "cross_entropy"}, {"name": "gepc", "loss": "cross_entropy"}], {}),
        ([{"name": "gep", "nonzero": True}, {"name": "gepc", "nonzero": True}, {"name": "cce"}], {}),
        ([{"name": "cls"}, {"name": "dar", "condition": "batch"}], {"attention": "full"}),
        (PRETRAINING, {"value_encoder": "category", "cell_embedding": "mean", "cell_conditions": ["batch"]}),
        (PRETRAINING, {"value_encoder": "scaling", "cell_embedding": "weighted", "norm": "pre"}),
        ([*PRETRAINING, {"name": "cce"}], {"input_norm": "domain", "domain": "batch"}),
        ([{"name": "gep"}], {"input_norm": "batch", "attention": "full", "padded_batches": True}),
    ],
    ids=["pretraining", "bins", "nonzero", "classes", "conditions", "scaling", "norms", "padding"],
)
def test_a_step_reads_nothing_back_and_copies_nothing(
    shards: Path, monkeypatch: pytest.MonkeyPatch, objectives: list[dict[str, Any]], model: dict[str, Any]
) -> None:
    monkeypatch.setattr(scgpt, "pick_backend", lambda *_: ("flash", "as on a GPU"))
    recipe = tiny_recipe(shards, Path("unused"), model=model, objectives=objectives, data={"fill_packs": True})
    take_steps(recipe, shards, monkeypatch)


@pytest.mark.parametrize("mixer", ["favor", "linear"])
@pytest.mark.parametrize(
    "objective", [{"name": "masked_bin"}, {"name": "cls", "head": "genes"}], ids=["bins", "classes"]
)
def test_a_step_of_scbert_reads_nothing_back_and_copies_nothing(
    shards: Path, monkeypatch: pytest.MonkeyPatch, mixer: str, objective: dict[str, Any]
) -> None:
    """All but the mixer's kernel, which the meta device does not run."""
    form = {"mixer": mixer, "performer": SCBERT["model"]["performer"]}
    recipe = scbert_recipe(shards, Path("unused"), model=form, objectives=[objective], data={"cells_per_batch": 18})
    take_steps(recipe, shards, monkeypatch)


def take_steps(recipe: Recipe, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take two training steps of a recipe on the meta device, the second of them watched."""
    quieten()
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # does not know the meta device
    module, data = assembled(recipe, shards)
    module._trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign,assignment]
    packs = data.pack_loader(range(120), shuffle=True, rank=0, world_size=1).prepare(0, 0)
    assert len(packs) > 1
    module.network.to("meta")
    on_meta = [pack.to("meta") for pack in packs]
    step_on_meta(module, on_meta)  # moves once what stays, as a first step does
    with NoCopies():
        step_on_meta(module, [pack.to("meta") for pack in on_meta])


def test_a_block_mask_is_built_without_waiting() -> None:
    """FlexAttention has no kernel for the meta device; what scfm lays out for it, once per pack, can be seen there."""
    tensors = torch.tensor([0, 130, 300], dtype=torch.int32), torch.tensor([50, 170], dtype=torch.int32)
    layout = AttentionLayout(*(x.to("meta") for x in tensors), n_tokens=300, longest=200)
    with NoCopies():
        mask = block_mask(layout)
    assert mask.kv_indices.shape == (1, 1, 3, 3)


def test_what_waits_would_be_seen() -> None:
    """The check can fail: each of these waits for a GPU. `torch.tensor(..., device=)` does too, and is not seen."""
    x, mask = torch.ones(4, device="meta"), torch.ones(4, dtype=torch.bool, device="meta")
    place = torch.zeros(2, dtype=torch.int64, device="meta")

    def put() -> None:
        x[place] = torch.tensor(1.0)

    waiting = [
        lambda: x.sum().item(),
        lambda: int(x.sum()),
        lambda: bool(mask.any()),
        lambda: x[mask],
        lambda: mask.nonzero(),
        lambda: torch.where(mask),
        lambda: torch.repeat_interleave(x, place),
        lambda: x.cpu(),
        lambda: x.tolist(),
        lambda: torch.ones(4).to("meta"),
        put,
    ]
    for call in waiting:
        with pytest.raises((RuntimeError, AssertionError)), NoCopies():
            call()


class Watch(L.Callback):
    """Makes a wait an error, from the third step on: the first ones set up what lasts."""

    def __init__(self) -> None:
        self.watched = 0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step >= 2:
            torch.cuda.set_sync_debug_mode("error")
            self.watched += 1

    def on_train_batch_end(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "flex"])
@pytest.mark.parametrize("objectives", [PRETRAINING, [*PRETRAINING, {"name": "ecs"}]], ids=["pretraining", "ecs"])
def test_gpu_step_waits_for_nothing(shards: Path, objectives: list[dict[str, Any]], backend: str) -> None:
    """All of a step: passes, losses, backward, clipping, fused AdamW."""
    recipe = tiny_recipe(
        shards,
        Path("unused"),
        objectives=objectives,
        model={"backend": backend, "width": 32},  # heads of 16, the narrowest that FlexAttention takes
        data={"fill_packs": True},
        trainer={"accelerator": "cuda", "precision": "bf16-mixed", "max_steps": 5},
    )
    module, data = assembled(recipe, shards)
    watch = Watch()
    try:
        build_trainer(recipe, callbacks=[watch], logger=False, enable_checkpointing=False).fit(module, data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.watched == 3
