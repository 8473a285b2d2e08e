"""LoRA: nothing changes at the start, only the updates learn, and merged weights compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packs import N_BINS, N_GENES, PAD, bin_pack, random_pack
from torch import nn

from scfm.data.batch import PackedBatch
from scfm.errors import ScfmError
from scfm.model import MODELS
from scfm.model.heads import HeadSpec
from scfm.model.lora import UPDATES, LoRALinear, add_lora, merge_lora
from scfm.recipe import ModelConfig, PerformerConfig
from scfm.training.run import set_trainable

CLASSES = ["a", "b", "c"]
SIZES: dict[str, Any] = {"width": 16, "heads": 2, "layers": 2, "hidden": 24, "dropout": 0.0}
CELLS = ([6, 4, 7], [6, 4, 7])  # lengths, and as many known: nothing is hidden
# name -> model section, head, pack
FORMS: dict[str, tuple[dict[str, Any], HeadSpec, PackedBatch]] = {
    "scgpt": ({}, HeadSpec("annotation", "cls", 3, CLASSES), random_pack(*CELLS)),
    "scgpt bypass": (
        {"unknown_output_projection": False, "norm": "pre"},
        HeadSpec("annotation", "cls", 3, CLASSES),
        random_pack([6, 4, 7], [3, 4, 2]),
    ),
    "scbert": (
        {"name": "scbert", "attention": "full", "cell_embedding": "mean"},
        HeadSpec("annotation", "genes", 3, CLASSES),
        bin_pack(*CELLS),
    ),
    "scbert glu": (
        {"name": "scbert", "attention": "full", "cell_embedding": "mean", "mixer": "softmax"},
        HeadSpec("annotation", "cls", 3, CLASSES),
        bin_pack(*CELLS),
    ),
}


def a_network(form: str) -> tuple[nn.Module, PackedBatch]:
    options, head, pack = FORMS[form]
    if options.get("name") == "scbert":
        options = options | {"performer": PerformerConfig(head_width=8, features=16, glu=form.endswith("glu"))}
    torch.manual_seed(0)
    config = ModelConfig(**SIZES | options)
    return MODELS[config.name](config, N_GENES + 2, PAD, N_BINS, {}, {}, [head]).eval(), pack


def moved(network: nn.Module) -> nn.Module:
    """Give every update a value, as training would."""
    for name, parameter in network.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter, std=0.5)
    return network


def logits(network: nn.Module, pack: PackedBatch) -> torch.Tensor:
    with torch.no_grad():
        return network(pack).predictions["annotation"]


@pytest.mark.parametrize("form", FORMS)
def test_updates_start_at_nothing_and_merge_into_the_same_weights(form: str) -> None:
    network, pack = a_network(form)
    names, before = list(network.state_dict()), logits(network, pack)
    added = add_lora(network, 4, 8.0, ["backbone.blocks.*"])
    assert added == [
        f"backbone.blocks.{i}.{layer}" for i in (0, 1) for layer in ("qkv", "out_proj", "linear1", "linear2")
    ]
    assert torch.equal(logits(network, pack), before)
    adapted = logits(moved(network), pack)
    assert not torch.allclose(adapted, before, atol=1e-2)
    merge_lora(network)
    assert list(network.state_dict()) == names
    assert not any(isinstance(module, LoRALinear) for module in network.modules())
    torch.testing.assert_close(logits(network, pack), adapted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["scgpt", "scbert"])
def test_only_updates_and_head_learn(form: str) -> None:
    network, pack = a_network(form)
    add_lora(network, 4, 8.0, ["backbone.blocks.*.qkv", "backbone.blocks.*.linear?"])
    set_trainable(network, [*UPDATES, "heads.*"])
    frozen = {n: p.clone() for n, p in network.named_parameters() if not n.startswith("heads.") and "lora_" not in n}
    moved(network).train()(pack).predictions["annotation"].square().sum().backward()
    learning = {name for name, p in network.named_parameters() if p.grad is not None}
    assert learning == {name for name, _ in network.named_parameters()} - frozen.keys()
    assert sum("lora_a" in name for name in learning) == sum("lora_b" in name for name in learning) == 6
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.1)
    optimizer.step()
    assert all(torch.equal(dict(network.named_parameters())[name], value) for name, value in frozen.items())


def test_the_update_is_the_written_out_product() -> None:
    torch.manual_seed(1)
    layer = nn.Linear(7, 5)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    update = LoRALinear(layer, 2, 3.0)
    nn.init.normal_(update.lora_b.weight)
    x = torch.randn(4, 7)
    a, b = update.lora_a.weight.detach(), update.lora_b.weight.detach()
    expected = x.double() @ (weight + 1.5 * b @ a).double().t() + bias.double()
    torch.testing.assert_close(update(x).double(), expected, rtol=1e-6, atol=1e-6)


def test_a_pattern_that_matches_nothing_and_a_rank_too_high_are_named() -> None:
    network, _ = a_network("scgpt")
    with pytest.raises(ScfmError, match=r"task\.lora\.layers: 'encoder\.\*' matches no linear layer.*blocks\.0\.qkv"):
        add_lora(network, 4, 8.0, ["encoder.*"])
    with pytest.raises(ScfmError, match=r"task\.lora\.rank: 16 is no less than the rank of backbone\.blocks\.0\.qkv"):
        add_lora(network, 16, 8.0, ["backbone.blocks.*"])
    with pytest.raises(ScfmError, match=r"'heads\.\*' matches no linear layer of the backbone"):
        add_lora(network, 4, 8.0, ["heads.*"])
