"""One optimizer step is one global batch, however it is cut into packs."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from runs import tiny_recipe, write_shards
from torch import Tensor

from scfm.checkpoints.native import ModelFiles, read_weights
from scfm.data.loader import PackLoader
from scfm.data.order import CellOrder
from scfm.data.shards import open_shards
from scfm.data.tokens import Tokeniser
from scfm.metrics_file import read_metrics
from scfm.model.scgpt import ScGPT
from scfm.objectives import build_objectives
from scfm.recipe import ObjectiveConfig, OptimizerConfig
from scfm.training.datamodule import CellDataModule
from scfm.training.launch import quieten
from scfm.training.module import FoundationModule, gather
from scfm.training.run import pretrain, token_config

SMALL_PACKS, ONE_PACK = 40, 5000
# Adam's step hangs on the sign of a gradient that is rounding error alone; a large eps lets only real gradients move it
SMOOTH = {"lr": 1e-2, "eps": 1e-2}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("cells") / "shards")


def weights_after(shards: Path, out: Path, **sections: object) -> dict[str, Tensor]:
    return read_weights(pretrain(tiny_recipe(shards, out, **sections)))


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize(
    "objectives",
    [
        [{"name": "gep"}, {"name": "gepc"}, {"name": "cell_prompt"}],
        [{"name": "gep", "loss": "cross_entropy"}, {"name": "gepc", "loss": "cross_entropy"}],
        [{"name": "gep"}, {"name": "ecs", "weight": 10.0, "threshold": 0.6}],
    ],
    ids=["mse", "cross-entropy", "ecs"],
)
def test_packs_change_nothing(shards: Path, tmp_path: Path, objectives: list[dict[str, object]]) -> None:
    still = {"model": {"dropout": 0.0}, "objectives": objectives, "optimizer": SMOOTH | {"clip": 0.5}}
    many = weights_after(shards, tmp_path / "many", **still, data={"tokens_per_pack": SMALL_PACKS})
    one = weights_after(shards, tmp_path / "one", **still, data={"tokens_per_pack": ONE_PACK})
    assert largest_difference(many, one) < 2e-5


def test_filling_packs_changes_nothing(shards: Path, tmp_path: Path) -> None:
    still = {"model": {"dropout": 0.0}, "optimizer": SMOOTH}
    ragged = weights_after(shards, tmp_path / "ragged", **still)
    filled = weights_after(shards, tmp_path / "filled", **still, data={"fill_packs": True})
    assert largest_difference(ragged, filled) < 2e-5


@pytest.mark.parametrize("value_encoder", ["continuous", "category"])
def test_hidden_genes_under_full_attention_are_learned(shards: Path, tmp_path: Path, value_encoder: str) -> None:
    """The BERT-style objective: hidden genes among the others, every token sees every token of its cell."""
    model = {"attention": "full", "value_encoder": value_encoder, "dropout": 0.0}
    objectives = [{"name": "gep"}, {"name": "gepc"}]
    trainer = {"max_steps": 60, "log_every_n_steps": 10}
    pretrain(tiny_recipe(shards, tmp_path / "run", model=model, objectives=objectives, trainer=trainer))
    losses = [value for _, name, value in read_metrics(tmp_path / "run" / "metrics.csv") if name == "train/loss"]
    assert losses[-1] < 0.8 * losses[0]


def test_a_run_repeats_itself_to_the_bit_and_another_seed_does_not(shards: Path, tmp_path: Path) -> None:
    first, again = weights_after(shards, tmp_path / "a"), weights_after(shards, tmp_path / "b")
    assert largest_difference(first, again) == 0
    assert largest_difference(first, weights_after(shards, tmp_path / "c", seed=1)) > 0


def test_clipping_bounds_the_step(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []

    def watch(module: FoundationModule, optimizer: torch.optim.Optimizer) -> None:
        clip(module, optimizer)
        trained = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(trained)))

    clip = FoundationModule.on_before_optimizer_step
    monkeypatch.setattr(FoundationModule, "on_before_optimizer_step", watch)
    weights_after(shards, tmp_path / "run", optimizer={"clip": 0.25}, data={"tokens_per_pack": SMALL_PACKS})
    assert len(norms) == 6
    assert max(norms) == pytest.approx(0.25, rel=1e-4)


def test_a_term_waits_for_its_first_step(shards: Path, tmp_path: Path) -> None:
    objectives = [{"name": "gep"}, {"name": "cell_prompt", "start_step": 4}]
    pretrain(tiny_recipe(shards, tmp_path / "run", objectives=objectives, trainer={"log_every_n_steps": 1}))
    rows = [line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    assert {int(step) for step, metric, _ in rows[1:] if metric == "train/cell_prompt"} == {5, 6}


@pytest.mark.parametrize("precision", ["bf16-mixed", "32"])
def test_precision_reaches_the_run_and_it_learns(shards: Path, tmp_path: Path, precision: str) -> None:
    model = pretrain(
        tiny_recipe(
            shards, tmp_path / "run", trainer={"precision": precision, "max_steps": 60, "log_every_n_steps": 10}
        )
    )
    assert f"precision {precision}" in (tmp_path / "run" / "log.txt").read_text()
    rows = [line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    losses = [float(value) for _, metric, value in rows if metric == "train/loss"]
    assert losses[-1] < 0.8 * losses[0]
    assert all(tensor.dtype == torch.float32 for tensor in read_weights(model).values())


def test_gathering_in_one_process_is_the_identity() -> None:
    cells = torch.randn(3, 4, requires_grad=True)
    assert gather(cells) is cells


@pytest.mark.parametrize("name", ["ecs", "cce"])
def test_losses_between_cells_are_pulled_through_packs_exactly(name: str) -> None:
    """The gradient handed to the packs is that of the loss over all cells at once; cce looks twice at each."""
    quieten()
    (objective,) = build_objectives([ObjectiveConfig(name, threshold=0.3)], n_bins=51)
    cells = [torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for _ in range(objective.views) for n in (3, 5)]
    views = [torch.cat(cells[i : i + 2]) for i in range(0, len(cells), 2)]
    expected = torch.autograd.grad(objective.loss(*views), cells)
    looks = iter(cells)

    class Pack:
        def __init__(self, index: int) -> None:
            self.index, self.n_cells = index, len(cells[index])
            self.real_positions = torch.arange(self.n_cells)

    class Fixed(torch.nn.Module):
        def forward(self, pack: Pack) -> object:
            return type("Output", (), {"cell": next(looks)})

    module = FoundationModule(Fixed(), [objective], OptimizerConfig())
    module._trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    _, pulls = module.global_losses([Pack(0), Pack(1)], [objective], [])  # type: ignore[list-item]
    for pull, gradient in zip([pull for view in pulls for pull in view], expected, strict=True):
        torch.testing.assert_close(pull.double(), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", [{"input_norm": "batch"}, {"input_norm": "domain", "domain": "batch"}])
def test_input_norms_train_alike_in_any_packs(shards: Path, tmp_path: Path, norm: dict[str, str]) -> None:
    """Statistics and their gradient join the whole global batch; without dropout, packs make no difference."""
    objectives = [{"name": "gep"}, {"name": "gepc"}, {"name": "cell_prompt"}, {"name": "cce"}]
    runs = []
    for tokens_per_pack in (60, 5000):
        recipe = tiny_recipe(
            shards,
            tmp_path / str(tokens_per_pack),
            objectives=objectives,
            model={"dropout": 0.0, **norm},
            data={"tokens_per_pack": tokens_per_pack},
            optimizer={"eps": 1e-2},
        )
        runs.append(read_weights(pretrain(recipe)))
    assert runs[0].keys() == runs[1].keys()
    assert runs[0]["backbone.input_norm.num_batches_tracked"].max() == 6
    for name, tensor in runs[0].items():
        torch.testing.assert_close(tensor, runs[1][name], rtol=0, atol=2e-5, msg=name)


def test_given_statistics_have_the_gradient_of_their_own(shards: Path) -> None:
    """One pack through the module is one pack through the network, whose norm measures for itself."""
    quieten()
    recipe = tiny_recipe(shards, Path("unused"), model={"dropout": 0.0, "input_norm": "domain", "domain": "batch"})
    recipe = replace(recipe, objectives=recipe.objectives[:2])
    store = open_shards(shards)
    objectives = build_objectives(recipe.objectives, n_bins=recipe.data.n_bins)
    heads = [head for objective in objectives for head in objective.heads()]
    names = {"batch": ["batch0", "batch1"]}
    files = ModelFiles(recipe.model, token_config(recipe), "counts", store.vocabulary, heads, cell_conditions=names)
    torch.manual_seed(0)
    plain = files.build().double().train()
    codes = {"batch": np.asarray(store.obs["batch"].codes, np.int64)}
    loader = PackLoader(
        store, CellOrder(range(120), 24, seed=0), files.tokeniser(), tokens_per_pack=5000, cell_conditions=codes
    )
    (pack,) = next(loader.batches(epoch=0))
    own = deepcopy(plain)
    sum(objective.loss(pack, output)[0] for output in [own(pack)] for objective in objectives).backward()
    module = FoundationModule(plain, objectives, OptimizerConfig())
    module._trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign,assignment]
    norms = module.measure_norms([pack], objectives)
    module.pack_losses(pack, module.look(pack, 0, norms), objectives)[0].backward()
    module.pull_norms(norms)
    for (name, ours), theirs in zip(plain.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10, msg=name)
    for (name, ours), theirs in zip(plain.named_buffers(), own.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_the_network_is_plain_torch() -> None:
    assert not issubclass(ScGPT, L.LightningModule)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_under_a_gradient_scaler_true_gradients_are_clipped(
    shards: Path, monkeypatch: pytest.MonkeyPatch, norm: str
) -> None:
    """16-mixed multiplies the loss by a large factor; what is clipped must be the gradients without it.

    So must be the part of the gradient that an input norm hands down in a backward of its own.
    """
    norms: dict[str, list[float]] = {"32": [], "16-mixed": []}
    clip = FoundationModule.on_before_optimizer_step

    def watch(module: FoundationModule, optimizer: torch.optim.Optimizer) -> None:
        trained = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms["16-mixed" if scaled else "32"].append(float(torch.nn.utils.get_total_norm(trained)))
        clip(module, optimizer)

    monkeypatch.setattr(FoundationModule, "on_before_optimizer_step", watch)
    form = {"dropout": 0.0, "input_norm": norm}
    recipe = tiny_recipe(shards, Path("unused"), model=form, optimizer={"lr": 1e-3, "clip": 0.25})
    store = open_shards(shards)
    for scaled in (False, True):
        objectives = build_objectives(recipe.objectives, n_bins=recipe.data.n_bins)
        heads = list({head.task: head for objective in objectives for head in objective.heads()}.values())
        files = ModelFiles(recipe.model, token_config(recipe), "counts", store.vocabulary, heads)
        torch.manual_seed(0)
        module = FoundationModule(files.build(), objectives, recipe.optimizer)
        tokeniser = Tokeniser(files.tokens, store.vocabulary, store.value_kind)
        data = CellDataModule(store, tokeniser, recipe.data, range(120), range(0), {}, seed=0)
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0)) if scaled else None
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = L.Trainer(accelerator="cpu", max_steps=4, plugins=precision, **quiet)
        trainer.fit(module, data)
    assert len(norms["16-mixed"]) == 4
    assert norms["16-mixed"] == pytest.approx(norms["32"], rel=0.02)
    assert min(norms["32"]) > 0.25
