"""Every attention backend against the definition: a dense softmax with a boolean mask in float64."""

from __future__ import annotations

import pytest
import torch
import varlen_on_cpu  # noqa: F401, gives the varlen operators a CPU kernel
from packs import random_pack
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.flop_counter import FlopCounterMode

from scfm.errors import ScfmError
from scfm.model import attention, attention_cpu
from scfm.model.attention import AttentionLayout, Flex, block_mask, fused_flex, pick_backend, prepare
from scfm.model.attention_cpu import runs_of

# (lengths, known): one cell only <cls> known, one all known, one of a single token, two alike (one kernel call)
CELLS = ([5, 9, 1, 6, 7, 7, 4], [3, 1, 1, 6, 4, 4, 3])
LONG = ([257, 611, 200, 200], [129, 300, 1, 200])
H, D = 2, 16  # FlexAttention has no narrower heads on a GPU


def layout_of(cells: tuple[list[int], list[int]], mode: str = "generative") -> AttentionLayout:
    lengths, known = cells
    cu_seqlens = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    generative = mode == "generative"
    n_keys = torch.tensor(known if generative else lengths).int()
    return AttentionLayout(cu_seqlens, n_keys, sum(lengths), max(lengths), self_key=generative)


def reference(qkv: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
    """Softmax over the keys that each token sees, cell by cell."""
    bounds, outputs = layout.cu_seqlens.tolist(), []
    for start, stop, keys in zip(bounds, bounds[1:], layout.n_keys.tolist(), strict=False):
        q, k, v = qkv[start:stop].transpose(0, 2).unbind(1)  # (H, n, d)
        sees = torch.eye(stop - start, dtype=torch.bool) & layout.self_key
        sees[:, :keys] = True
        weights = (q @ k.mT * scale).masked_fill(~sees, -torch.inf).softmax(-1)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs)


def random_qkv(layout: AttentionLayout, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(int(layout.cu_seqlens[-1]), 3, H, D, generator=draw, dtype=torch.float64)


def forward_backward(function, qkv: Tensor, layout: AttentionLayout) -> tuple[Tensor, Tensor]:
    qkv = qkv.detach().clone().requires_grad_()
    out = function(qkv, layout, 0.3)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (grad,) = torch.autograd.grad(out, qkv, pull.to(out.dtype))
    return out.detach(), grad


def backend_call(backend: str):
    return lambda qkv, layout, scale: prepare(layout, backend)(qkv, scale)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("mode", ["generative", "full"])
@pytest.mark.parametrize("cells", [CELLS, LONG], ids=["edges", "long"])
@pytest.mark.parametrize("backend", ["flash", "flash_cpu", "blocks_cpu", "dense"])
def test_backends_equal_the_definition(backend: str, cells: tuple[list[int], list[int]], mode: str) -> None:
    """Forward and backward; float32 as close as float32 can be. `flash` runs its own code around a stand-in kernel."""
    layout = layout_of(cells, mode)
    qkv = random_qkv(layout)
    expected = forward_backward(reference, qkv, layout)
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        ours = forward_backward(backend_call(backend), qkv.to(dtype), layout)
        for got, want in zip(ours, expected, strict=True):
            assert got.dtype == dtype
            assert relative(got, want) < tolerance


@pytest.mark.parametrize("backend", ["flash", "flash_cpu", "blocks_cpu"])
def test_gradcheck(backend: str) -> None:
    """The hand-written backwards against finite differences: <cls> only, all known, one token, mixed."""
    layout = layout_of(([3, 4, 1, 3], [2, 1, 1, 3]))
    qkv = random_qkv(layout)[:, :, :, :2].clone().requires_grad_()  # a narrow head keeps it fast
    assert torch.autograd.gradcheck(prepare(layout, backend), qkv)


def test_blocks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads and rows of many blocks give what one block gives."""
    layout = layout_of(LONG)
    qkv = random_qkv(layout)
    expected = forward_backward(reference, qkv, layout)
    monkeypatch.setattr(attention_cpu, "LOGITS_PER_BLOCK", 5_000)
    for got, want in zip(forward_backward(backend_call("blocks_cpu"), qkv, layout), expected, strict=True):
        assert relative(got, want) < 1e-14


def test_merging_through_a_log_sum_exp_without_gradient_would_be_wrong() -> None:
    """The trap that the merged backward avoids: kernels return a log-sum-exp that carries no gradient."""
    layout = layout_of(LONG)
    qkv = random_qkv(layout)

    def trap(qkv: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
        outputs = []
        for run in runs_of(layout.cu_seqlens, layout.n_keys):
            q, k, v = (run.heads_first(x) for x in qkv.unbind(1))
            m = run.keys
            known = (q @ k[:, :, :m].mT * scale).logsumexp(-1).detach()
            o = (q @ k[:, :, :m].mT * scale).softmax(-1) @ v[:, :, :m]
            s = ((q * k).sum(-1) * scale).index_fill(-1, torch.arange(m), -torch.inf)
            total = torch.logaddexp(known, s)
            o = o * (known - total).exp()[..., None] + v * (s - total).exp()[..., None]
            outputs.append(o.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)

    out, grad = forward_backward(reference, qkv, layout)
    trap_out, trap_grad = forward_backward(trap, qkv, layout)
    ours_out, ours_grad = forward_backward(backend_call("flash_cpu"), qkv, layout)
    assert relative(trap_out, out) < 1e-14  # nothing to see in the forward
    assert relative(trap_grad, grad) > 0.1
    assert max(relative(ours_out, out), relative(ours_grad, grad)) < 1e-14


def test_neighbours_of_one_shape_share_a_kernel_call() -> None:
    layout = layout_of(CELLS)
    runs = runs_of(layout.cu_seqlens, layout.n_keys)
    assert [(run.cells, run.length, run.keys) for run in runs] == [
        (1, 5, 3),
        (1, 9, 1),
        (1, 1, 1),
        (1, 6, 6),
        (2, 7, 4),
        (1, 4, 3),
    ]


def test_layout_reads_the_mask_from_the_pack() -> None:
    batch = random_pack([4, 3], [2, 3])
    assert AttentionLayout.of(batch, "generative").n_keys.tolist() == [2, 3]
    assert AttentionLayout.of(batch, "full").n_keys.tolist() == [4, 3]


def test_a_pack_is_two_sequences_per_cell_for_a_varlen_kernel() -> None:
    """All tokens of a cell and its visible keys; no queries and its hidden keys. Together they cover every row."""
    varlen = prepare(layout_of(([5, 9, 1], [3, 1, 1])), "flash")
    assert varlen.cu_q.tolist() == [0, 5, 5, 14, 14, 15, 15]
    assert varlen.cu_k.tolist() == [0, 3, 5, 6, 14, 15, 15]
    assert varlen.hidden.tolist() == [False] * 3 + [True] * 2 + [False] + [True] * 8 + [False]


def test_nobody_sees_a_hidden_key_of_another_token() -> None:
    """Its gradient is exactly zero, in the rows that the second sequences fill too."""
    layout = layout_of(CELLS)
    for backend in ("flash", "flash_cpu", "blocks_cpu"):
        qkv = random_qkv(layout).requires_grad_()
        own = prepare(layout, backend)(qkv)[6]  # the second token of the cell in which only <cls> is known
        (grad,) = torch.autograd.grad(own.sum(), qkv)
        seen = grad[:, 1:].flatten(1).abs().sum(1).nonzero()[:, 0].tolist()
        assert seen == [5, 6]


@pytest.mark.parametrize("mode", ["generative", "full"])
@pytest.mark.parametrize("cells", [LONG, ([128, 128, 300, 84], [128, 100, 1, 40]), ([40] * 20, [3] * 20)])
def test_block_mask_equals_the_definition(cells: tuple[list[int], list[int]], mode: str) -> None:
    """Blocks that are left out hold no pair that is seen, whole ones no pair that is not; the forward pass agrees."""
    layout = layout_of(cells, mode)
    mask, n = block_mask(layout), layout.n_tokens
    sees = torch.block_diag(*[torch.ones(length, length) for length in cells[0]]).bool() & layout.visible
    if layout.self_key:
        sees |= torch.eye(n, dtype=torch.bool)
    blocks = torch.nn.functional.pad(sees, (0, -n % 128, 0, -n % 128)).unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    some, whole = blocks.any(3).any(1), blocks.all(3).all(1)
    assert torch.equal(listed(mask.kv_num_blocks, mask.kv_indices), some & ~whole)
    assert torch.equal(listed(mask.full_kv_num_blocks, mask.full_kv_indices), whole)
    qkv = random_qkv(layout).float()
    with torch.no_grad():  # FlexAttention has no backward on a CPU
        assert relative(Flex(mask)(qkv, 0.3), reference(qkv.double(), layout, 0.3)) < 1e-6


def test_flex_is_compiled_with_the_block_that_calls_it() -> None:
    """On a GPU it is compiled by itself; in a block that is compiled, a second torch.compile would be an error."""

    def block(q: Tensor, mask: BlockMask) -> Tensor:
        return fused_flex()(q, q, q, block_mask=mask)

    layout = layout_of(LONG)
    q, mask = random_qkv(layout).float()[:, 0].transpose(0, 1)[None], block_mask(layout)
    with torch.no_grad():
        together = torch.compile(block, fullgraph=True, dynamic=True, backend="eager")(q, mask)
        assert torch.allclose(together, flex_attention(q, q, q, block_mask=mask), atol=1e-6)


def listed(counts: Tensor, indices: Tensor) -> Tensor:
    """(Q, K) bool from a block mask's lists."""
    chosen = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, (count, order) in enumerate(zip(counts[0, 0].tolist(), indices[0, 0].tolist(), strict=True)):
        chosen[row, order[:count]] = True
    return chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_keep_torchs_rules(dtype: torch.dtype) -> None:
    """Schema, fake tensors and tracing, which torch.compile, FakeTensor and FLOP counting rest on."""
    layout = layout_of(CELLS)
    qkv = random_qkv(layout).to(dtype)
    varlen = prepare(layout, "flash")
    cpu = (layout.cu_seqlens, layout.n_keys, True, 0.3)
    out, lse, p = torch.ops.scfm.cell_attention(qkv, *cpu)
    calls = {
        torch.ops.scfm.cell_attention: (qkv, *cpu),
        torch.ops.scfm.cell_attention_backward: (out, qkv, out, lse, torch.zeros_like(p), *cpu),
    }
    calls[torch.ops.scfm.block_attention] = (qkv, *cpu)
    calls[torch.ops.scfm.block_attention_backward] = (out, qkv, *cpu)
    parts, constants = qkv.unbind(1), (varlen.cu_q, varlen.cu_k, layout.longest, 0.3, "flash")
    out, lse = torch.ops.scfm.varlen_attention(*parts, *constants)
    calls[torch.ops.scfm.varlen_attention] = (*parts, *constants)
    calls[torch.ops.scfm.varlen_attention_backward] = (out, *parts, out, lse, *constants)
    for operator, arguments in calls.items():
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        assert set(torch.library.opcheck(operator, arguments, test_utils=tests).values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ["flash", "flash_cpu", "blocks_cpu"])
def test_shapes_flow_without_data(backend: str) -> None:
    """On the meta device, forward and backward, as a plan of a run needs them."""
    layout = layout_of(CELLS)
    meta = AttentionLayout(layout.cu_seqlens.to("meta"), layout.n_keys.to("meta"), layout.n_tokens, layout.longest)
    qkv = random_qkv(layout).to("meta").requires_grad_()
    out = prepare(meta, backend)(qkv)
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    assert (out.shape, grad.shape) == (qkv[:, 0].shape, qkv.shape)


@pytest.mark.parametrize("backend", ["flash", "flash_cpu", "blocks_cpu"])
def test_flops_are_those_that_the_mask_asks_for(backend: str) -> None:
    """Two products per visible pair forward, five backward; an unknown gene's own key is left out."""
    layout = layout_of(CELLS)
    qkv = random_qkv(layout).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        prepare(layout, backend)(qkv).sum().backward()
    pairs = sum(length * known for length, known in zip(*CELLS, strict=True))
    assert counter.get_total_flops() == (2 + 5) * 2 * pairs * H * D


CUDA = torch.device("cuda", 0)
BF16 = torch.bfloat16


def test_backend_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash wherever its kernels run; the reason is said; what cannot run is refused with the reason."""
    monkeypatch.setattr(attention, "find_spec", lambda package: None)
    monkeypatch.setattr(attention, "multiplies_bf16", lambda device: True)
    assert pick_backend("cpu")[0] == "flash_cpu"
    assert pick_backend("cpu", BF16)[0] == "blocks_cpu"
    monkeypatch.setattr(attention, "multiplies_bf16", lambda device: False)
    assert pick_backend("cpu", BF16)[0] == "flash_cpu"
    assert pick_backend("mps", BF16)[0] == "dense"
    assert pick_backend("cpu", asked="dense") == ("dense", "chosen by model.backend")
    for capability, dtype, width, expected in [
        ((9, 0), BF16, 64, "flash"),
        ((8, 0), torch.float16, 32, "flash"),
        ((8, 0), torch.float32, 32, "dense"),
        ((7, 5), torch.float16, 32, "dense"),
        ((9, 0), BF16, 20, "dense"),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert pick_backend(CUDA, dtype, width)[0] == expected
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "bf16-mixed" in pick_backend(CUDA, torch.float32, 64)[1]
    with pytest.raises(ScfmError, match=r"flash needs bf16 or fp16 .trainer\.precision: bf16-mixed., not float32"):
        pick_backend(CUDA, torch.float32, 64, "flash")
    with pytest.raises(ScfmError, match=r"flash_attn_2 needs the package flash_attn, which is not installed"):
        pick_backend(CUDA, BF16, 64, "flash_attn_2")
    with pytest.raises(ScfmError, match=r"flex needs heads of at least 16, not 8"):
        pick_backend(CUDA, BF16, 8, "flex")
    with pytest.raises(ScfmError, match=r"flash_cpu does not run on cuda; choose auto"):
        pick_backend(CUDA, BF16, 64, "flash_cpu")
    with pytest.raises(ScfmError, match=r"flash does not run on cpu; choose auto"):
        pick_backend("cpu", asked="flash")
    assert pick_backend(CUDA, BF16, 64, dropout=0.1)[0] == "dense"
    with pytest.raises(ScfmError, match=r"flash cannot drop attention weights"):
        pick_backend(CUDA, BF16, 64, "flash", dropout=0.1)
    with pytest.raises(ScfmError, match=r"no 'fast'; choose from auto, flash, "):
        pick_backend("cpu", asked="fast")
    monkeypatch.setattr(attention, "find_spec", lambda package: package)
    assert pick_backend(CUDA, BF16, 64)[0] == "flash_attn_3"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert pick_backend(CUDA, BF16, 64)[0] == "flash"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert pick_backend(CUDA, BF16, 64)[0] == "dense"


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["generative", "full"])
@pytest.mark.parametrize("cells", [CELLS, LONG], ids=["edges", "long"])
@pytest.mark.parametrize("backend", ["flash", "flash_attn_2", "flash_attn_3", "flex"])
def test_gpu_backends_equal_the_definition(backend: str, cells: tuple[list[int], list[int]], mode: str) -> None:
    """As on a CPU, in bf16: as close to float64 as the dense reference in bf16 is, by half as much again."""
    if reason := attention.why_not(backend, CUDA, BF16, D):
        pytest.skip(f"{backend} {reason}")
    layout = layout_of(cells, mode)
    qkv = random_qkv(layout)
    expected = forward_backward(reference, qkv, layout)
    cuda = AttentionLayout(
        layout.cu_seqlens.cuda(), layout.n_keys.cuda(), layout.n_tokens, layout.longest, layout.self_key
    )
    ours = forward_backward(backend_call(backend), qkv.to(CUDA, BF16), cuda)
    dense = forward_backward(backend_call("dense"), qkv.to(CUDA, BF16), cuda)
    for got, peer, want in zip(ours, dense, expected, strict=True):
        assert got.isfinite().all()
        assert relative(got.cpu(), want) < max(1.5 * relative(peer.cpu(), want), 1e-2)
