"""Compiled and recomputed blocks train as plain ones do."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import varlen_on_cpu  # noqa: F401, gives the varlen operators a CPU kernel
from packs import N_BINS, N_GENES, PAD, bin_pack, random_pack
from runs import tiny_recipe, write_shards
from scbert_runs import SCBERT, scbert_recipe
from torch import Tensor, nn

import scfm.model.scgpt as scgpt
from scfm.checkpoints.native import read_weights
from scfm.model import ScBERT, ScGPT
from scfm.model.heads import HeadSpec
from scfm.model.mixer_block import MixerBlock
from scfm.model.transformer import Block
from scfm.recipe import ModelConfig, PerformerConfig, TrainerConfig
from scfm.training.run import pretrain, set_up_blocks


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("cells") / "shards")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace and differentiate as torch.compile does, but run the graphs as they are: compiling C++ takes minutes."""
    torch._dynamo.reset()
    for kind in (Block, MixerBlock):
        monkeypatch.setattr(
            kind, "compile", lambda self, **options: nn.Module.compile(self, backend="aot_eager", **options)
        )


def weights_after(shards: Path, out: Path, **sections: Any) -> dict[str, Tensor]:
    return read_weights(pretrain(tiny_recipe(shards, out, **sections)))


def test_recomputed_blocks_are_the_same_to_the_bit(shards: Path, tmp_path: Path) -> None:
    """Dropout draws the same numbers again."""
    plain = weights_after(shards, tmp_path / "plain")
    again = weights_after(shards, tmp_path / "again", trainer={"gradient_checkpointing": True})
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_recomputation_keeps_only_what_goes_into_a_block() -> None:
    kept: dict[bool, int] = {}
    for recompute in (False, True):
        network = small_network(layers=4)
        set_up_blocks(network, TrainerConfig(gradient_checkpointing=recompute))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, into=sizes: into.append(x.nbytes) or x, lambda x: x):
            network(random_pack([30, 20], [20, 10]))
        kept[recompute] = sum(sizes)
    assert kept[True] < 0.4 * kept[False]


@pytest.mark.usefixtures("no_compiler")
def test_compiled_blocks_train_alike(shards: Path, tmp_path: Path) -> None:
    still = {"model": {"dropout": 0.0}, "optimizer": {"eps": 1e-2}}
    plain = weights_after(shards, tmp_path / "plain", **still)
    compiled = weights_after(shards, tmp_path / "compiled", **still, trainer={"compile": True})
    assert plain.keys() == compiled.keys()
    assert max(float((plain[name] - compiled[name]).abs().max()) for name in plain) < 2e-5


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("attention", ["generative", "full"])
@pytest.mark.parametrize("backend", ["flash", "flash_cpu", "dense"])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_no_pack_compiles_a_block_again(backend: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither another number of tokens nor of cells, nor another mask; `flash` around a stand-in kernel."""
    monkeypatch.setattr(scgpt, "pick_backend", lambda *_: (backend, "asked for"))
    torch._dynamo.reset()
    network, plain = (small_network(attention=attention) for _ in range(2))
    set_up_blocks(network, TrainerConfig(compile=True))
    for lengths, known in (([5, 9, 6], [3, 1, 6]), ([4, 8, 2, 6, 3], [2, 2, 1, 3, 3]), ([10, 3], [5, 2])):
        pack = random_pack(lengths, known)
        pack.longest = 40  # a constant of the run
        outputs = [model(pack) for model in (network, plain)]
        assert torch.allclose(outputs[0].tokens, outputs[1].tokens, atol=1e-6)
        outputs[0].predictions["gep"].sum().backward()


SCBERT_FORMS = pytest.mark.parametrize(
    ("mixer", "form"),
    [
        ("favor", {}),
        ("favor", {"mode": "compat", "norm": "scale", "glu": True}),
        ("favor", {"kernel": "relu", "norm": "rezero"}),
        ("linear", {"reversible": True}),
        ("softmax", {}),
    ],
    ids=str,
)


@pytest.mark.usefixtures("no_compiler")
@SCBERT_FORMS
def test_compiled_scbert_trains_alike(shards: Path, tmp_path: Path, mixer: str, form: dict[str, Any]) -> None:
    """Also across a redraw of the features, which the compiled blocks have to see."""
    performer = {**SCBERT["model"]["performer"], **form}
    common: dict[str, Any] = {"model": {"mixer": mixer, "performer": performer}, "optimizer": {"eps": 1e-2}}
    plain = read_weights(pretrain(scbert_recipe(shards, tmp_path / "plain", **common)))
    compiled = read_weights(pretrain(scbert_recipe(shards, tmp_path / "fast", **common, trainer={"compile": True})))
    assert plain.keys() == compiled.keys()
    assert max(float((plain[name] - compiled[name]).abs().max()) for name in plain) < 2e-5


@pytest.mark.usefixtures("no_compiler")
@torch._dynamo.config.patch(error_on_recompile=True)
@SCBERT_FORMS
def test_no_pack_compiles_a_block_of_scbert_again(mixer: str, form: dict[str, Any]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = ModelConfig(
        name="scbert", width=16, heads=2, layers=2, hidden=16, dropout=0.0, attention="full", mixer=mixer,
        performer=PerformerConfig(**{"head_width": 8, **form}),
    )  # fmt: skip
    network = ScBERT(config, N_GENES + 2, PAD, N_BINS, {}, {}, [HeadSpec("masked_bin", "bins", N_BINS + 1)])
    plain = deepcopy(network)
    set_up_blocks(network, TrainerConfig(compile=True))
    for lengths, known in (([5, 9, 6], [3, 1, 6]), ([4, 8, 2, 6, 3], [2, 2, 1, 3, 3]), ([10, 3], [5, 2])):
        pack = bin_pack(lengths, known)
        pack.longest = 40  # a constant of the run
        outputs = [model(pack) for model in (network, plain)]
        assert torch.allclose(outputs[0].tokens, outputs[1].tokens, atol=1e-5)
        outputs[0].predictions["masked_bin"].sum().backward()


def small_network(layers: int = 2, **options: Any) -> ScGPT:
    torch.manual_seed(0)
    config = ModelConfig(width=16, heads=2, layers=layers, hidden=16, dropout=0.0, **options)
    return ScGPT(config, N_GENES + 2, PAD, N_BINS, {}, {}, [HeadSpec("gep", "gep")])


def test_attention_dropout_drops_weights_in_training_only() -> None:
    torch.manual_seed(0)
    config = ModelConfig(width=16, heads=2, layers=1, hidden=16, dropout=0.0, attention_dropout=0.5)
    network, pack = ScGPT(config, N_GENES + 2, PAD, N_BINS, {}, {}, []), random_pack([30, 20], [20, 10])
    assert not torch.equal(network(pack).tokens, network(pack).tokens)
    network.eval()
    assert torch.equal(network(pack).tokens, network(pack).tokens)
