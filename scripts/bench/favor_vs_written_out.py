"""FAVOR+ in blocks beside FAVOR+ as it is written down, and beside exact attention: scBERT's network, one cell.

    OMP_NUM_THREADS=1 python scripts/bench/favor_vs_written_out.py --genes 16907 --repeats 5

Two blocks of scBERT (width 200, 10 heads of 64, 266 features, hidden 800), a norm and a reader of 7 bins; forward and
backward of the cross entropy over all genes, float32, one thread, CPU time of this process, networks in turns. The peer
is the formula spelled out in torch's own layers: directions repeated for every head, einsum, a tensor for each step of
the features, everything kept for the backward. `einsum` runs that with scfm's linear layers: the mixer's share of the
difference. Memory is what a step adds to the network and its input, in a process of its own (see
`scfm.bench.mixers`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfm.bench.mixers import growth_of, peak_of_process
from scfm.bench.report import device_name, of_times, significant
from scfm.evaluation.provenance import provenance
from scfm.model.layers import Linear
from scfm.model.mixer_block import MixerBlock
from scfm.model.performer import Mixer, Segments
from scfm.recipe import ModelConfig, PerformerConfig

WIDTH, HEADS, LAYERS, HIDDEN, BINS = 200, 10, 2, 800, 7
PEER = "written out"
NETWORKS = ("favor correct", "favor compat", PEER, "einsum", "linear", "softmax")


class WrittenOut(Mixer):
    """FAVOR+ of one cell, step by step as the formulas stand (compat: one maximum over all keys, eps after exp)."""

    projection: Tensor

    def __init__(self, projection: Tensor) -> None:
        super().__init__()
        self.register_buffer("projection", projection)

    def forward(self, qkv: Tensor, segments: Segments, key_mask: Tensor | None = None) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in qkv.unbind(1))  # (1, H, T, d)
        phi_q, phi_k = self.features(q, query=True), self.features(k, query=False)
        inverse = 1.0 / torch.einsum("bhnf,bhf->bhn", phi_q, phi_k.sum(-2))
        context = torch.einsum("bhnf,bhnd->bhfd", phi_k, v)
        return torch.einsum("bhfd,bhnf,bhn->bhnd", context, phi_q, inverse)[0].transpose(0, 1)

    def features(self, x: Tensor, query: bool) -> Tensor:
        scale, ratio = x.shape[-1] ** -0.25, len(self.projection) ** -0.5
        directions = self.projection.repeat(*x.shape[:2], 1, 1)  # (1, H, m, d)
        p = torch.einsum("bhnd,bhfd->bhnf", scale * x, directions)
        n = ((x**2).sum(-1) / 2.0 * scale**2).unsqueeze(-1)
        peak = p.amax(-1, keepdim=True) if query else p.amax()
        return ratio * (torch.exp(p - n - peak) + 1e-4)


class Network(nn.Module):
    """Two blocks, a norm and a reader of bins, (T, D) -> (T, 7)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        mode = "correct" if name == "favor correct" else "compat"
        mixer: Any = name if name in ("linear", "softmax") else "favor"
        config = ModelConfig(width=WIDTH, heads=HEADS, hidden=HIDDEN, dropout=0.0, mixer=mixer)
        config.performer = PerformerConfig(mode=mode)
        torch.manual_seed(0)
        blocks = [MixerBlock(config) for _ in range(LAYERS)]
        for block in blocks:
            if name in (PEER, "einsum"):
                block.mixer = WrittenOut(block.mixer.projection)
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.reader = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, BINS)
        if name == PEER:
            in_torchs_own_layers(self.blocks)

    def forward(self, x: Tensor, cells: Segments) -> Tensor:
        for block in self.blocks:
            x = block(x, cells)
        return self.reader(self.norm(x))


def in_torchs_own_layers(module: nn.Module) -> None:
    """Put torch's linear layers in the place of scfm's."""
    for name, child in module.named_children():
        if isinstance(child, Linear):
            own = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
            own.load_state_dict(child.state_dict())
            setattr(module, name, own)
        else:
            in_torchs_own_layers(child)


def step_of(name: str, genes: int) -> Callable[[], Tensor]:
    """Return a forward and backward pass of a network over a random cell, which gives the loss."""
    network = Network(name)
    draw = torch.Generator().manual_seed(1)
    x, bins = torch.randn(genes, WIDTH, generator=draw), torch.randint(0, BINS, (genes,), generator=draw)
    cells = Segments(torch.tensor([0, genes], dtype=torch.int32), genes)
    return partial(step, network, x, bins, cells)


def step(network: Network, x: Tensor, bins: Tensor, cells: Segments) -> Tensor:
    network.zero_grad()
    loss = F.cross_entropy(network(x, cells), bins)
    loss.backward()
    return loss.detach()


def difference(genes: int = 500) -> dict[str, float]:
    """Return the relative differences of output and gradient between compat and the peer, the same weights in both."""
    found = []
    for name in ("favor compat", PEER):
        network = Network(name)
        x = torch.randn(genes, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = network(x, Segments(torch.tensor([0, genes], dtype=torch.int32), genes))
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), [x, *network.parameters()])))
    ours, theirs = found
    off = [float((mine - other).norm() / other.norm()) for mine, other in zip(ours, theirs, strict=True)]
    return {"output": significant(off[0], 2), "worst gradient": significant(max(off[1:]), 2)}


def compare(genes: int, repeats: int, names: list[str]) -> dict[str, Any]:
    """Return the seconds and the peak memory of each network, and their ratios to the peer."""
    steps = {name: step_of(name, genes) for name in names}
    for warm in (step_of(name, 256) for name in names):
        warm()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            start = time.process_time()
            steps[name]()
            seconds[name].append(time.process_time() - start)
    peaks = {
        name: peak_of_process([sys.executable, __file__, "--measure", name, "--genes", str(genes)]) for name in names
    }
    rows = {}
    for name in names:
        ratios = [theirs / mine for mine, theirs in zip(seconds[name], seconds[PEER], strict=True)]
        rows[name] = {
            "seconds": of_times(seconds[name]),
            "peak_mib": peaks[name],
            "speed_to_written_out": significant(median(ratios), 3),
            "memory_to_written_out": significant(peaks[name] / peaks[PEER], 3),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genes", type=int, default=16907)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--measure", choices=NETWORKS, help="only print the MiB that a step of this network adds")
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        step_of(options.measure, 256)()
        print(growth_of(step_of(options.measure, options.genes)))
        return
    names = [PEER, *(name for name in options.networks if name != PEER)]
    result = {
        "bench": "favor_vs_written_out",
        "genes": options.genes,
        "repeats": options.repeats,
        "networks": compare(options.genes, options.repeats, names),
        "difference_to_compat": difference(),
        "shape": {
            "width": WIDTH,
            "heads": HEADS,
            "layers": LAYERS,
            "hidden": HIDDEN,
            "head_width": 64,
            "features": 266,
        },
        "clock": "CPU time of one thread",
        "device": device_name("cpu"),
        **provenance(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
