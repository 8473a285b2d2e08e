"""What training keeps in memory: weights, gradients, optimizer states, and what autograd saves for the backward.

Autograd saves the input and the output of every linear layer once: each output is the input of what follows (attention,
a norm, an activation). That is all of a pass but for three things: a ReLU saves its output, which without dropout is
the next layer's input; dropout saves its mask; and under autocast the input of a norm is float32.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from scfm.errors import ScfmError
from scfm.flops import Work
from scfm.model.embeddings import CategoryValue, ContinuousValue
from scfm.model.heads import ClassDecoder, ProductDecoder
from scfm.recipe import ModelConfig

FLOAT32, INDEX = 4, 8
ADAM_STATES = 2  # per weight
USABLE = 0.9  # share of a GPU's memory; the rest goes to the driver's context and to fragmentation
CPU_SHARE = 0.5  # of a machine's free memory; the rest is for shards, batches prepared ahead and the heap's own room


def free_memory() -> float:
    """Return the bytes of memory that this machine can still give, or all it has where the system does not say.

    A job of a cluster or a container may be allowed less than the machine has (cgroup v2).
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min([free, *allowed_memory()])


def allowed_memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[float]:
    """Return the bytes that each group of this process still allows it (cgroup v2), files in memory not counted."""
    if not own.exists():
        return []
    names = [line.removeprefix("0::/") for line in own.read_text().splitlines() if line.startswith("0::/")]
    folders = [
        folder
        for name in names
        for folder in (root / name, *(root / name).parents)
        if root in (folder, *folder.parents)
    ]
    found = []
    for folder in folders:
        limit, stat = folder / "memory.max", folder / "memory.stat"
        if limit.exists() and stat.exists() and (most := limit.read_text().strip()) != "max":
            used = next(float(line.split()[1]) for line in stat.read_text().splitlines() if line.startswith("anon "))
            found.append(max(float(most) - used, 0.0))
    return found


@dataclass(frozen=True)
class Precision:
    """Bytes of a number: of weights, gradients and optimizer states, of matrix products, and of norms' inputs."""

    weights: int
    products: int
    norms: int

    @classmethod
    def of(cls, name: str | int) -> Precision:
        """Read `trainer.precision`. Raises ScfmError for one that is not planned."""
        text = str(name).lower()
        if text in ("32", "32-true"):
            return cls(4, 4, 4)
        if text in ("bf16-mixed", "16-mixed", "bf16", "16"):  # weights stay in float32
            return cls(4, 2, 4)
        if text in ("bf16-true", "16-true"):
            return cls(2, 2, 2)
        if text in ("64", "64-true"):
            return cls(8, 8, 8)
        raise ScfmError(f"trainer.precision: {name} is not planned; choose 32, bf16-mixed, 16-mixed, bf16-true or 64")


@dataclass(frozen=True)
class Place:
    """Where a pack is computed.

    Attributes:
        precision: bytes of a number.
        mask: bytes per element of a dropout mask: 1 on GPUs; 0 for those of scfm's own on CPUs, of the values' type.
        dense: whether attention runs on padded cells with a mask, which it keeps.
        longest: tokens of the longest cell, for dense attention.
        recompute: whether blocks keep only what goes into them (`trainer.gradient_checkpointing`).
    """

    precision: Precision
    mask: int
    dense: bool
    longest: int
    recompute: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the fullest moment of a step, by part."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    workspace: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.workspace


def memory_of(network: nn.Module, config: ModelConfig, pack: Work, passes: int, several: bool, at: Place) -> Memory:
    """Return the memory of a training step.

    Args:
        network: the model; a meta device will do.
        config: its shape.
        pack: the work of one pack, pseudo-cells included.
        passes: forward passes whose graphs are alive at the same time.
        several: whether a step has several packs, whose gradients add up.
        at: where it is computed.
    """
    width = at.precision.weights
    sizes = [p.numel() for p in network.parameters() if p.requires_grad]
    trained = sum(sizes) * width
    activations = passes * saved_bytes(network, config, pack, at)
    # the backward's own tensors: gradients of one block's products; later, when activations are gone, a gradient of
    # the gene embedding per pass, added to that of the packs before
    flowing = pack.tokens * (5 * config.width + config.hidden) * at.precision.norms
    tables = max(sizes, default=0) * width * ((passes > 1) + several)
    workspace = max(activations + flowing, tables) - activations
    if at.precision.products < width:  # autocast keeps its casts of the weights
        workspace += at.precision.products * sum(
            layer.weight.numel() for layer in network.modules() if isinstance(layer, nn.Linear)
        )
    weights = sum(p.numel() for p in network.parameters()) * width
    return Memory(weights, trained, ADAM_STATES * trained, activations, workspace)


def saved_bytes(network: nn.Module, config: ModelConfig, pack: Work, at: Place) -> float:
    """Return what autograd saves in one forward pass of a pack."""
    model: Any = network
    tokens = embedding_bytes(model.backbone, config, at)
    blocks = [block_bytes(block, config, at) for block in model.backbone.blocks]
    # of recomputed blocks one at a time is whole; their inputs are norms' outputs
    tokens += max(blocks) + len(blocks) * at.precision.norms * config.width if at.recompute else sum(blocks)
    return pack.tokens * tokens + sum(head_bytes(head, pack, at) for head in model.heads.values())


def block_bytes(block: Any, config: ModelConfig, at: Place) -> float:
    """Return what autograd saves of a block, per token."""
    number, width, hidden = at.precision.products, config.width, config.hidden
    shared = hidden if config.activation == "relu" and config.dropout == 0 else 0
    saved = number * (in_and_out(block) - shared) + (at.precision.norms - number) * 2 * width
    saved += mask_bytes(2 * width + hidden, at) if config.dropout > 0 else 0
    saved += 4 * FLOAT32  # mean and deviation of two norms
    if at.dense:  # the padded output, the mask as numbers, the log-sum-exp
        return saved + number * (width + at.longest) + FLOAT32 * config.heads
    return saved + 2 * FLOAT32 * config.heads  # log-sum-exp and share of the self key


def embedding_bytes(backbone: Any, config: ModelConfig, at: Place) -> float:
    """Return what autograd saves before the first block, per token."""
    width = config.width
    saved = at.precision.weights * width + 5 * FLOAT32  # the genes' vectors before their norm, norms' statistics
    encoder = backbone.value_encoder
    if isinstance(encoder, ContinuousValue):
        saved += INDEX  # of each value among the levels, whose own vectors are few
        saved += mask_bytes(width, at) if config.dropout > 0 else 0
    elif isinstance(encoder, CategoryValue):
        saved += at.precision.weights * width
    return saved + (2 * at.precision.norms * width if config.input_norm != "none" else 0)


def head_bytes(head: nn.Module, pack: Work, at: Place) -> float:
    """Return what autograd saves of a head and its loss."""
    number = at.precision.products
    if isinstance(head, ClassDecoder):
        return pack.cells * number * in_and_out(head)
    if isinstance(head, ProductDecoder) and head.out is None:
        met = sum(layer.out_features for layer in (head.project, head.nonzero) if layer is not None)
        return pack.unknown * number * (in_and_out(head.query) + met)
    out = getattr(head, "out", None)
    logits = out.out_features if isinstance(out, nn.Linear) and out.out_features > 1 else 0
    # a cross-entropy's logits and their log-softmax are in float32
    return pack.unknown * (number * in_and_out(head) + 2 * FLOAT32 * logits)


def in_and_out(module: nn.Module) -> int:
    """Return the numbers per row that a module's linear layers read and write."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return sum(layer.in_features + layer.out_features for layer in layers)


def mask_bytes(elements: int, at: Place) -> int:
    return elements * (at.mask or at.precision.products)
