"""What autograd saves against the formula that `scfm plan` uses, for every form of a block and a head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packs import N_BINS, N_GENES, PAD, random_pack
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from scfm.data.batch import PackedBatch
from scfm.errors import ScfmError
from scfm.flops import Work
from scfm.memory import Place, Precision, memory_of, saved_bytes
from scfm.model import ScGPT
from scfm.model.heads import HeadSpec
from scfm.objectives import build_objectives
from scfm.recipe import ModelConfig, ObjectiveConfig

LENGTHS, KNOWN = [40] * 6, [20] * 6


def measured(network: nn.Module, pack: PackedBatch, objectives: list[Any], mixed: bool) -> int:
    """Return the bytes of all storages that autograd saves in a forward pass, weights and the batch left out."""
    leave_out = [*network.parameters(), *(field for field in vars(pack).values() if isinstance(field, Tensor))]
    known = {tensor.untyped_storage().data_ptr() for tensor in leave_out}
    saved: dict[int, Tensor] = {}  # the tensors themselves, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        is_cast_of_a_weight = mixed and tensor.dtype == torch.bfloat16 and tensor.shape in shapes
        if tensor.untyped_storage().data_ptr() not in known and not is_cast_of_a_weight:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    layers = [layer.weight for layer in network.modules() if isinstance(layer, nn.Linear)]
    shapes = {shape for weight in layers for shape in (weight.shape, weight.t().shape)}
    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        output = network(pack)
        losses = [objective.loss(pack, output)[0] for objective in objectives]
    assert all(loss.requires_grad for loss in losses)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16-mixed"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"backend": "dense"},
        {"activation": "gelu", "hidden": 96},
        {"norm": "pre", "attention": "full", "value_encoder": "category"},
        {"value_encoder": "scaling", "unknown_output_projection": False},
    ],
    ids=lambda options: " ".join(map(str, options.values())) or "usual",
)
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_saved_bytes(options: dict[str, Any], loss: Any, dropout: float, mixed: bool) -> None:
    torch.manual_seed(0)
    config = ModelConfig(**{"width": 64, "heads": 4, "layers": 3, "hidden": 64, "dropout": dropout} | options)
    objectives = build_objectives([ObjectiveConfig("gep", loss=loss), ObjectiveConfig("gepc", loss=loss)], N_BINS)
    heads = [head for objective in objectives for head in objective.heads()]
    network = ScGPT(config, N_GENES + 2, PAD, N_BINS, {}, {}, heads).train()
    pack = random_pack(LENGTHS, KNOWN)
    pack.levels = torch.arange(-2, N_BINS).float()
    at = Place(Precision.of("bf16-mixed" if mixed else "32"), 0, config.backend == "dense", max(LENGTHS))
    planned = saved_bytes(network, config, Work.of(pack, config.attention), at)
    assert planned == pytest.approx(measured(network, pack, objectives, mixed), rel=0.03)


def test_kilobytes_per_token_and_layer_of_the_published_shape() -> None:
    """18.5 KB in float32; 11.3 KB in bf16 autocast without dropout, 15.4 KB with it (its masks in bf16, on a CPU)."""
    config = ModelConfig(layers=1, dropout=0.0)

    def per_layer(dropout: float, precision: str, mask: int = 0) -> float:
        works = []
        for layers in (1, 2):
            config = ModelConfig(layers=layers, dropout=dropout)
            network = ScGPT(config, 100, 0, 51, {}, {}, [])
            works.append(saved_bytes(network, config, Work(1), Place(Precision.of(precision), mask, False, 0)))
        return works[1] - works[0]

    assert config.width == 512
    assert per_layer(0.0, "32") == 9 * 512 * 4 + 80
    assert per_layer(0.0, "bf16-mixed") == 22 * 512 + 80
    assert per_layer(0.2, "bf16-mixed") == 30 * 512 + 80
    assert per_layer(0.2, "bf16-mixed", mask=1) == 22 * 512 + 2 * 512 + 3 * 512 + 80


def test_recomputed_blocks_keep_their_inputs_and_one_of_them_is_whole() -> None:
    config = ModelConfig(dropout=0.0)
    network = ScGPT(config, 100, 0, 51, {}, {}, [])
    plain, recomputed = (
        saved_bytes(network, config, Work(1), Place(Precision.of("bf16-mixed"), 1, False, 0, recompute))
        for recompute in (False, True)
    )
    assert plain - recomputed == 11 * (22 * 512 + 80) - 12 * 4 * 512


def test_memory_by_hand() -> None:
    config = ModelConfig(width=16, heads=2, layers=1, hidden=16)
    network = ScGPT(config, 1000, 0, N_BINS, {}, {}, [HeadSpec("gep", "gep")])
    n = sum(p.numel() for p in network.parameters())
    at = Place(Precision.of("32"), 0, False, 10)
    pack = Work(100, 10, 50, 0)
    one, two = (memory_of(network, config, pack, passes, False, at) for passes in (1, 2))
    assert (one.weights, one.gradients, one.optimizer) == (4 * n, 4 * n, 8 * n)
    assert two.activations == 2 * one.activations
    assert one.total == sum(vars(one).values())
    assert memory_of(network, config, Work(), 1, False, at).workspace == 0
    assert memory_of(network, config, Work(), 2, True, at).workspace == 2 * 4 * 16 * 1000
    network.backbone.requires_grad_(False)
    assert memory_of(network, config, pack, 1, False, at).optimizer < 0.1 * one.optimizer


def test_an_unplanned_precision_is_refused() -> None:
    with pytest.raises(ScfmError, match=r"trainer.precision: transformer-engine is not planned; choose 32"):
        Precision.of("transformer-engine")
