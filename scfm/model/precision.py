"""The precision of inference: float32, which is exact, or bf16 where the device computes it fast."""

from __future__ import annotations

import platform
from copy import deepcopy
from functools import cache
from itertools import chain
from typing import Any, Literal, get_args

import torch
from torch import nn

from scfm.errors import ScfmError
from scfm.model.layers import Linear

Precision = Literal["fp32", "bf16"]
LACKS = {"cpu": "CPU, without AVX512-BF16, AMX or Arm's BF16,", "cuda": "GPU, older than Ampere,"}


@cache
def multiplies_bf16(device: str) -> bool:
    """Return whether a kind of device (`cpu`, `cuda`) has instructions for bf16 products, rather than emulates them."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    cpu: Any = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def at_precision(network: nn.Module, precision: Precision, device: torch.device) -> nn.Module:
    """Return a network for inference: itself for fp32; for bf16 a twin whose blocks' matrices are cast, once.

    Residuals, norms, embeddings, pooling and heads cost little: they stay in float32, shared by both networks. With a
    residual in bf16 the speed is the same, and 1 - cosine to the float32 embedding 1.3e-4 instead of 5e-5.

    Raises ScfmError for a precision that does not exist, and for bf16 on a device without bf16 instructions.
    """
    if precision not in get_args(Precision):
        raise ScfmError(f"precision: {precision!r} is not known; choose one of {', '.join(get_args(Precision))}")
    if precision == "fp32":
        return network
    if not multiplies_bf16(device.type):
        this = LACKS.get(device.type, device.type)
        raise ScfmError(f"precision: bf16 would be slower than fp32 here: this {this} has no bf16 products; use fp32")
    backbone: Any = network.backbone
    layers = [module for module in backbone.blocks.modules() if isinstance(module, Linear)]
    cast = {id(tensor) for layer in layers for tensor in layer.parameters()}
    tensors = chain(network.parameters(), network.buffers())
    twin: Any = deepcopy(network, {id(tensor): tensor for tensor in tensors if id(tensor) not in cast})
    for module in twin.backbone.blocks.modules():
        if isinstance(module, Linear):
            module.to(torch.bfloat16)
    return twin
