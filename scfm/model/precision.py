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

Precision = Literal["fp32", "bf16"]


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
    """Return a network for inference: itself for fp32; for bf16 a twin whose transformer blocks are cast, once.

    Embeddings, input norm, pooling and heads cost little, stay as they are, and are shared by both networks.

    Raises ScfmError for a precision that does not exist, and for bf16 on a device without bf16 instructions.
    """
    if precision not in get_args(Precision):
        raise ScfmError(f"precision: {precision!r} is not known; choose one of {', '.join(get_args(Precision))}")
    if precision == "fp32":
        return network
    if not multiplies_bf16(device.type):
        lacks = "AVX512-BF16, AMX nor Arm's BF16 instructions" if device.type == "cpu" else "bf16 products of its own"
        raise ScfmError(
            f"precision: bf16 is meant to be faster, but would be slower than fp32 and less exact here, for this "
            f"{device.type} has neither {lacks}".replace("neither bf16", "no bf16")
            + "; leave precision at fp32"
        )
    blocks: Any = network.backbone.blocks
    cast = {id(tensor) for tensor in blocks.parameters()}
    tensors = chain(network.parameters(), network.buffers())
    twin: Any = deepcopy(network, {id(tensor): tensor for tensor in tensors if id(tensor) not in cast})
    twin.backbone.blocks.to(torch.bfloat16)
    return twin
