"""LoRA: frozen matrices that learn a low-rank update (Hu et al., ICLR 2022), added for training and merged to save.

A layer y = W x + b becomes y = W x + b + (alpha / rank) B A x, of which only A and B train. B starts at zero, so that
the first forward is that of the pretrained model; merged, W + (alpha / rank) B A takes W's place under its own name.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from scfm.errors import ScfmError
from scfm.model.layers import Linear

# which parameters train beside the heads, as name patterns
UPDATES = ("*.lora_a.weight", "*.lora_b.weight")


class LoRALinear(Linear):
    """A linear layer with a low-rank update: (T, in) -> (T, out).

    Args:
        layer: whose weight and bias it takes over, under their names.
        rank: of the update.
        alpha: the update is scaled by alpha / rank.
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        place: Any = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.lora_a = Linear(layer.in_features, rank, bias=False, **place)
        self.lora_b = Linear(rank, layer.out_features, bias=False, **place)
        nn.init.zeros_(self.lora_b.weight)
        self.scale = alpha / rank

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.scale * self.lora_b(self.lora_a(input))

    @torch.no_grad()
    def merged(self) -> Linear:
        """Return a plain layer that computes the same; it takes over the weight and the bias of this one."""
        plain = Linear(self.in_features, self.out_features, device="meta")
        plain.weight, plain.bias = self.weight, self.bias
        plain.weight += self.scale * self.lora_b.weight @ self.lora_a.weight
        return plain


def add_lora(network: nn.Module, rank: int, alpha: float, layers: Sequence[str]) -> list[str]:
    """Give linear layers of the backbone a low-rank update, in place; return their names.

    Args:
        network: a model, weights in place.
        rank: of the updates.
        alpha: updates are scaled by alpha / rank.
        layers: name patterns, e.g. `backbone.blocks.*` or `backbone.blocks.*.qkv`.

    Raises:
        ScfmError: a pattern matches no linear layer of the backbone, or a layer is no wider than the rank.
    """
    linear = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("backbone.")
    ]
    for pattern in layers:
        if not any(fnmatch(name, pattern) for name in linear):
            raise ScfmError(
                f"task.lora.layers: {pattern!r} matches no linear layer of the backbone; they are {', '.join(linear)}"
            )
    chosen = [name for name in linear if any(fnmatch(name, pattern) for pattern in layers)]
    for name in chosen:
        layer: Any = network.get_submodule(name)
        if rank >= min(layer.in_features, layer.out_features):
            raise ScfmError(
                f"task.lora.rank: {rank} is no less than the rank of {name}, {layer.in_features} to "
                f"{layer.out_features}; lower it, or train all weights with task.setting full"
            )
    for name in chosen:
        put(network, name, LoRALinear(network.get_submodule(name), rank, alpha))  # type: ignore[arg-type]
    return chosen


def merge_lora(network: nn.Module) -> None:
    """Put W + (alpha / rank) B A in the place of every low-rank update, in place; nothing without any."""
    for name, module in list(network.named_modules()):
        if isinstance(module, LoRALinear):
            put(network, name, module.merged())


def put(network: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a submodule by its name."""
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module.train(network.training))
