"""Every attention backend against the definition: a dense softmax with a boolean mask in float64."""

from __future__ import annotations

import pytest
import torch
from packs import random_pack
from torch import Tensor

from scfm.errors import ScfmError
from scfm.model.attention import BACKENDS, AttentionLayout, attend, pick_backend

# (lengths, known): one cell only <cls> known, one all known, one of a single token, two alike (one kernel call)
CELLS = ([5, 9, 1, 6, 7, 7, 4], [3, 1, 1, 6, 4, 4, 3])
LONG = ([257, 611, 200, 200], [129, 300, 1, 200])
H, D = 2, 8


def layout_of(cells: tuple[list[int], list[int]], mode: str = "generative") -> AttentionLayout:
    lengths, known = cells
    cu_seqlens = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    return AttentionLayout(cu_seqlens, torch.tensor(known if mode == "generative" else lengths).int())


def reference(qkv: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
    """Softmax over the keys that each token sees, cell by cell."""
    bounds, outputs = layout.cu_seqlens.tolist(), []
    for start, stop, keys in zip(bounds, bounds[1:], layout.n_keys.tolist(), strict=False):
        q, k, v = qkv[start:stop].transpose(0, 2).unbind(1)  # (H, n, d)
        sees = torch.eye(stop - start, dtype=torch.bool)
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


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("mode", ["generative", "full"])
@pytest.mark.parametrize("cells", [CELLS, LONG], ids=["edges", "long"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_equal_the_definition(backend: str, cells: tuple[list[int], list[int]], mode: str) -> None:
    """Forward and backward; float32 as close as float32 can be."""
    layout = layout_of(cells, mode)
    qkv = random_qkv(layout)
    expected = forward_backward(reference, qkv, layout)
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        ours = forward_backward(BACKENDS[backend], qkv.to(dtype), layout)
        for got, want in zip(ours, expected, strict=True):
            assert got.dtype == dtype
            assert relative(got, want) < tolerance


def test_gradcheck() -> None:
    """The hand-written backward against finite differences: <cls> only, all known, one token, mixed."""
    layout = layout_of(CELLS)
    qkv = random_qkv(layout)[:, :, :, :2].clone().requires_grad_()  # a narrow head keeps it fast
    assert torch.autograd.gradcheck(lambda x: attend(x, layout, backend="flash_cpu"), qkv)


def test_merging_through_a_log_sum_exp_without_gradient_would_be_wrong() -> None:
    """The trap that the merged backward avoids: kernels return a log-sum-exp that carries no gradient."""
    layout = layout_of(LONG)
    qkv = random_qkv(layout)

    def trap(qkv: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
        outputs = []
        for run in layout.runs:
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
    ours_out, ours_grad = forward_backward(BACKENDS["flash_cpu"], qkv, layout)
    assert relative(trap_out, out) < 1e-14  # nothing to see in the forward
    assert relative(trap_grad, grad) > 0.1
    assert max(relative(ours_out, out), relative(ours_grad, grad)) < 1e-14


def test_neighbours_of_one_shape_share_a_kernel_call() -> None:
    runs = layout_of(CELLS).runs
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


def test_backend_choice() -> None:
    assert pick_backend("cpu")[0] == "flash_cpu"
    assert pick_backend("cuda")[0] == "dense"
    assert pick_backend("cpu", "dense") == ("dense", "chosen by model.backend")
    with pytest.raises(ScfmError, match=r"flash_cpu does not run on cuda.*choose auto or dense"):
        pick_backend("cuda", "flash_cpu")
    with pytest.raises(ScfmError, match=r"no 'fast'; choose from auto, flash_cpu, dense"):
        pick_backend("cpu", "fast")
