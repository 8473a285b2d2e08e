"""Parts of the GPU check that need no training: exactness of attention, matrix products, attention's speed.

Sizes: T tokens, H heads, d their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from statistics import median
from typing import Any

import torch
from gpu_record import Figures, Record
from torch import Tensor

from scfm.ceiling import matmul_ceiling, seconds_of
from scfm.model.attention import BACKENDS, AttentionLayout, prepare, why_not
from scfm.model.transformer import Block
from scfm.recipe import ModelConfig

BF16 = torch.bfloat16
EDGES = [(300, 1), (257, 257), (1, 1)]  # (tokens, known): <cls> alone, everything, a single token
COMPILES = ("flash", "flash_attn_2", "flash_attn_3", "flash_cpu")  # the others index by masks, or compile themselves

Cells = list[tuple[int, int]]


def ragged(n: int, seed: int, tiny: bool) -> Cells:
    """Return edge cases and cells of 200 to 1201 tokens with any share of them known."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(200, 1202, (n,), generator=draw) // (50 if tiny else 1)
    shares = torch.rand(n, generator=draw).tolist()
    edges = [(max(length // 30, 1), max(known // 30, 1)) for length, known in EDGES] if tiny else EDGES
    drawn = [(length, max(1, int(length * share))) for length, share in zip(lengths.tolist(), shares, strict=True)]
    return [*drawn[: n // 2], *edges, *drawn[n // 2 :]]


def layout_of(cells: Cells, device: torch.device, longest: int) -> AttentionLayout:
    lengths, known = torch.tensor(cells).t()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return AttentionLayout(cu_seqlens.to(device), known.int().to(device), int(lengths.sum()), longest)


def usable(device: torch.device, head_width: int) -> list[str]:
    """Return the backends that run here."""
    return [name for name in BACKENDS if why_not(name, device, BF16, head_width) is None]


def definition(cells: Cells, qkv: Tensor) -> Tensor:
    """Attend as the mask says, cell by cell: (T, 3, H, d) -> (T, H, d)."""
    outputs, start = [], 0
    for length, known in cells:
        q, k, v = qkv[start : start + length].transpose(0, 2).unbind(1)  # (H, n, d)
        sees = torch.eye(length, dtype=torch.bool, device=qkv.device)
        sees[:, :known] = True
        weights = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~sees, -torch.inf).softmax(-1)
        outputs.append((weights @ v).transpose(0, 1))
        start += length
    return torch.cat(outputs)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


def drawn(shape: Sequence[int], device: torch.device, seed: int) -> Tensor:
    """Return normal numbers in float64, the same on every device."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64).to(device)


def numerics(record: Record) -> None:
    """Every backend in bf16 against float64: alone, then inside a block, eager and compiled, over three layouts."""
    heads, width = (2, 8) if record.tiny else (8, 64)
    backends = usable(record.device, width)
    cells = ragged(4 if record.tiny else 16, 0, record.tiny)
    dense: Figures = {}
    for backend in ["dense", *(name for name in backends if name not in ("dense", "flex"))]:
        row = record.row(backend, partial(attention_errors, record, backend, cells, heads, width, dense))
        dense = row if backend == "dense" else dense
    for backend in [name for name in COMPILES if name in backends]:
        record.row(f"block, {backend}", partial(block_errors, record, backend, heads, width), needs=20)
    if "flex" in backends:  # compiles itself, which takes long
        record.row("flex", partial(attention_errors, record, "flex", cells, heads, width, dense), needs=15)


def attention_errors(record: Record, backend: str, cells: Cells, heads: int, width: int, dense: Figures) -> Figures:
    """Return relative errors of the output and the gradients; good are those of dense bf16, by half as much again."""
    layout = layout_of(cells, record.device, max(length for length, _ in cells))
    base = drawn((layout.n_tokens, 3, heads, width), record.device, 1)
    pull = drawn((layout.n_tokens, heads, width), record.device, 2)
    attention = prepare(layout, backend)

    def both(function: Callable[[Tensor], Tensor], dtype: torch.dtype, pull: Tensor) -> list[Tensor]:
        qkv = base.to(dtype).requires_grad_()
        out = function(qkv)
        (grad,) = torch.autograd.grad(out, qkv, pull.to(dtype))
        return [out.detach(), *grad.unbind(1)]

    wanted = both(lambda qkv: definition(cells, qkv), torch.float64, pull)
    got = both(attention, BF16, pull)
    names = ("out", "dq", "dk", "dv")
    figures: Figures = {name: relative(a, b) for name, a, b in zip(names, got, wanted, strict=True)}
    figures["finite"] = all(bool(x.isfinite().all()) for x in got)
    # nobody but itself sees an unknown gene: if only known tokens are pulled, its key and value get exactly nothing
    seen = both(attention, BF16, pull * layout.visible[:, None, None])
    figures["hidden_gradient"] = max(float(x[~layout.visible].abs().max()) for x in seen[2:])
    bounds = {name: max(1.5 * dense.get(name, 0.0), 1e-2) for name in names}
    close = all(figures[name] < bound for name, bound in bounds.items())
    return figures | {"ok": close and figures["finite"] and figures["hidden_gradient"] == 0}


def block_errors(record: Record, backend: str, heads: int, width: int) -> Figures:
    """Return the errors of a block under bf16 autocast, eager and compiled, and the graphs compiled for 3 layouts."""
    device, wide = record.device, heads * width
    config = ModelConfig(
        width=wide, heads=heads, layers=1, hidden=wide, dropout=0.0, unknown_output_projection=False
    )  # fmt: skip
    torch.manual_seed(0)
    block = Block(config).to(device)
    exact, compiled = deepcopy(block).double(), deepcopy(block)
    compiled.compile(fullgraph=True, dynamic=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    counted = torch._dynamo.utils.counters["stats"]
    figures: Figures = {"eager": 0.0, "compiled": 0.0, "graphs": []}
    before = counted["unique_graphs"]
    for seed, n in enumerate((6, 9, 4)):
        cells = ragged(n, seed, record.tiny)
        layout = layout_of(cells, device, 1201)
        x, pull = (drawn((layout.n_tokens, wide), device, 10 + i) for i in range(2))
        unknown = ~layout.visible

        def run(
            module: Block, attend: Any, dtype: torch.dtype, x: Tensor, pull: Tensor, unknown: Tensor
        ) -> list[Tensor]:
            x = x.to(dtype).requires_grad_()
            with torch.autocast(device.type, BF16, enabled=dtype != torch.float64):
                out = module(x, attend, unknown)
            return [out.detach(), *torch.autograd.grad(out, [x, module.qkv.weight], pull.to(out.dtype))]

        wanted = run(exact, lambda qkv, cells=cells: definition(cells, qkv), torch.float64, x, pull, unknown)
        for name, module in (("eager", block), ("compiled", compiled)):
            got = run(module, prepare(layout, backend), torch.float32, x, pull, unknown)
            figures[name] = max(figures[name], *(relative(a, b) for a, b in zip(got, wanted, strict=True)))
        figures["graphs"].append(counted["unique_graphs"] - before)
    close = figures["eager"] < 5e-2 and figures["compiled"] < max(1.5 * figures["eager"], 1e-2)
    figures["ok"] = close and figures["graphs"][0] == figures["graphs"][-1]
    return figures


def matmuls(record: Record) -> None:
    """The ceiling that MFU is stated against, and the products of a block of width 512."""
    device, tiny = record.device, record.tiny

    def square(size: int) -> Figures:
        rate = matmul_ceiling(device, BF16, size, 0.05 if tiny else 1.0)
        record.ceiling = max(record.ceiling or 0.0, rate)
        return {"tflops": rate / 1e12}

    for size in (64,) if tiny else (8192, 4096, 16384):
        record.row(f"square {size}", partial(square, size))
    tokens = 128 if tiny else 131072
    for k, n in ((512, 1536), (512, 512)):
        record.row(f"{tokens} x {k} x {n}", partial(products, device, tokens, k, n, tiny))


def products(device: torch.device, tokens: int, k: int, n: int, tiny: bool) -> Figures:
    """Return the TFLOP/s of a linear layer's forward, and of its backward's two products."""
    x, grad = (torch.randn(tokens, width, device=device, dtype=BF16) for width in (k, n))
    weight = torch.randn(n, k, device=device, dtype=BF16)
    calls = {"forward": lambda: x @ weight.t(), "to_input": lambda: grad @ weight, "to_weight": lambda: grad.t() @ x}
    return {f"{name}_tflops": 2e-12 * tokens * k * n / timed(call, device, tiny) for name, call in calls.items()}


def timed(call: Callable[[], object], device: torch.device, tiny: bool) -> float:
    """Return the median seconds of a call; short ones are timed in a row, as long as 20 ms."""
    for _ in range(1 if tiny else 3):
        call()
    calls = 1 if tiny else max(1, round(0.02 / seconds_of(call, device)))
    return median(seconds_of(call, device, calls) for _ in range(1 if tiny else 15))


def attention_speed(record: Record) -> None:
    """Forward, and forward with backward, of every backend at three shares of known genes; and of no mask at all."""
    heads, width, n, tokens = (2, 8, 2, 24) if record.tiny else (8, 64, 109, 1201)
    for share in (0.5, 0.25, 0.75, 1.0):
        layout = layout_of([(tokens, max(1, int(tokens * share)))] * n, record.device, tokens)
        for backend in [name for name in usable(record.device, width) if share < 1 or name in COMPILES]:
            for compiled in [False, True] if backend in COMPILES and not record.tiny else [False]:
                item = f"{share:.0%} known, {backend}" + (", compiled" if compiled else "")
                record.row(item, partial(speed, record, layout, backend, compiled, heads, width), needs=4)


def speed(record: Record, layout: AttentionLayout, backend: str, compiled: bool, heads: int, width: int) -> Figures:
    attention: Any = prepare(layout, backend)
    if compiled:
        inner = attention
        attention = torch.compile(lambda qkv: inner(qkv), fullgraph=True)
    qkv = torch.randn(layout.n_tokens, 3, heads, width, device=record.device, dtype=BF16, requires_grad=True)
    pull = torch.randn(layout.n_tokens, heads, width, device=record.device, dtype=BF16)
    forward = timed(lambda: attention(qkv), record.device, record.tiny)
    both = timed(lambda: torch.autograd.grad(attention(qkv), qkv, pull), record.device, record.tiny)
    # the pairs that the mask asks for; each costs two products forward and four backward, recomputation not counted
    pairs = int((layout.cu_seqlens.diff().long() * layout.n_keys).sum())
    return {
        "forward_ms": forward * 1e3,
        "both_ms": both * 1e3,
        "forward_tflops": 4e-12 * pairs * heads * width / forward,
        "tflops": 12e-12 * pairs * heads * width / both,
    }
