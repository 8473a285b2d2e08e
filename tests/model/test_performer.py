"""scBERT's mixers against the definition, their gradients, and what each mode promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixing import mixed, segments_of, weights
from packs import random_pack
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scfm.errors import ScfmError
from scfm.model import features
from scfm.model.performer import Favor, LinearAttention, Mixer, Segments, Softmax, build_mixer, orthogonal_directions
from scfm.recipe import ModelConfig, PerformerConfig

H, D, M = 3, 6, 11
KERNELS = ("exp", "relu", "gelu", "none")
MIXERS: dict[str, dict[str, Any]] = {
    "linear": {"mixer": "linear"},
    "softmax": {"mixer": "softmax"},
    **{kernel: {"kernel": kernel} for kernel in KERNELS},
    **{f"{kernel} compat": {"kernel": kernel, "mode": "compat"} for kernel in KERNELS},
}
IN_BLOCKS = ("linear", "exp", "relu", "exp compat", "relu compat")
RAGGED, EQUAL = [5, 9, 1, 6, 7, 7, 4], [8, 8, 8]


def build(name: str, features: int = M, **settings: Any) -> Mixer:
    options = dict(MIXERS[name])
    mixer = options.pop("mixer", "favor")
    torch.manual_seed(3)
    form = PerformerConfig(head_width=D, features=features, **options, **settings)
    return build_mixer(ModelConfig(mixer=mixer, performer=form)).double()


def random_qkv(n_tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n_tokens, 3, H, D, generator=draw, dtype=torch.float64).to(dtype)


def random_mask(lengths: list[int], seed: int = 0) -> Tensor:
    """A mask that leaves every cell its first key."""
    kept = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed)) > 0.4
    kept[segments_of(lengths).cu_seqlens[:-1].long()] = True
    return kept


def with_gradient(function: Any, qkv: Tensor) -> tuple[Tensor, Tensor]:
    qkv = qkv.detach().clone().requires_grad_()
    out = function(qkv)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return out.detach(), torch.autograd.grad(out, qkv, pull.to(out.dtype))[0]


def off(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


def settle_blocks(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Let a block hold so many positions of a head with M features."""
    monkeypatch.setitem(features.FEATURES_PER_BLOCK, "cpu", rows * M)


@pytest.mark.parametrize("rows", [2, 8, 10_000])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", [RAGGED, EQUAL], ids=["ragged", "equal"])
@pytest.mark.parametrize("name", MIXERS)
def test_forward_and_gradient_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, name: str, lengths: list[int], masked: bool, rows: int
) -> None:
    """In blocks of a few positions of one head, of whole cells, and of all cells at once."""
    settle_blocks(monkeypatch, rows)
    mixer, qkv = build(name), random_qkv(sum(lengths))
    mask = random_mask(lengths) if masked else None
    expected = with_gradient(lambda x: mixed(mixer, x, lengths, mask), qkv)
    found = with_gradient(lambda x: mixer(x, segments_of(lengths), mask), qkv)
    tolerance = 1e-10 if "gelu" in name else 1e-13  # gelu's normaliser comes near zero
    assert max(off(mine, right) for mine, right in zip(found, expected, strict=True)) < tolerance
    if "gelu" not in name:
        found = with_gradient(lambda x: mixer.float()(x, segments_of(lengths), mask), qkv.float())
        assert max(off(mine, right) for mine, right in zip(found, expected, strict=True)) < 2e-6


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", [[3, 1], [2, 2]], ids=["ragged", "equal"])
@pytest.mark.parametrize("name", IN_BLOCKS)
def test_gradcheck(monkeypatch: pytest.MonkeyPatch, name: str, lengths: list[int], masked: bool) -> None:
    """The hand-written backward against finite differences, through compat's maxima too."""
    settle_blocks(monkeypatch, 2)
    mixer, qkv = build(name), random_qkv(sum(lengths))[:, :, :2].clone().requires_grad_()
    mask = random_mask(lengths) if masked else None
    assert torch.autograd.gradcheck(lambda x: mixer(x, segments_of(lengths), mask), qkv)


def test_the_gradient_through_compats_maximum_is_no_trifle() -> None:
    """What detaching it, as later releases of the Performer do, would change."""
    mixer, qkv = build("exp compat"), random_qkv(8)
    _, ours = with_gradient(lambda x: mixer(x, segments_of([8])), qkv)

    def detached(x: Tensor) -> Tensor:
        q, k, v = x.transpose(0, 2).unbind(1)
        w = mixer.projection.t() * D**-0.25
        halves = [y.square().sum(-1, keepdim=True) / 2 * D**-0.5 for y in (q, k)]
        p_q, p_k = q @ w, k @ w
        phi_q = (p_q - halves[0] - p_q.amax(-1, keepdim=True).detach()).exp() + 1e-4
        phi_k = (p_k - halves[1] - p_k.amax().detach()).exp() + 1e-4
        products = phi_q @ phi_k.mT
        return (products / products.sum(-1, keepdim=True) @ v).transpose(0, 1)

    assert off(with_gradient(detached, qkv)[1], ours) > 1e-4


@pytest.mark.parametrize("lengths", [RAGGED, EQUAL], ids=["ragged", "equal"])
@pytest.mark.parametrize("name", MIXERS)
def test_gene_scores_are_column_means_of_the_attention_matrix(
    monkeypatch: pytest.MonkeyPatch, name: str, lengths: list[int]
) -> None:
    settle_blocks(monkeypatch, 4)
    monkeypatch.setattr("scfm.model.performer.LOGITS_AT_ONCE", 50)
    mixer, qkv = build(name), random_qkv(sum(lengths))
    expected = torch.cat([w.mean((0, 1)) for w in weights(mixer, qkv, lengths)])
    scores = mixer.gene_scores(qkv, segments_of(lengths))
    assert off(scores, expected) < 1e-10
    torch.testing.assert_close(torch.stack([x.sum() for x in scores.split(lengths)]), torch.ones(len(lengths)).double())
    assert mixer.float().gene_scores(qkv.bfloat16(), segments_of(lengths)).dtype == torch.float32


correct = st.sampled_from([name for name in MIXERS if "compat" not in name])
packs = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None)
@given(correct, packs, st.integers(0, 2**32 - 1), st.sampled_from([2, 7, 10_000]))
def test_correct_a_cell_is_the_same_alone_padded_and_in_any_order(
    name: str, lengths: list[int], seed: int, rows: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        settle_blocks(patch, rows)
        mixer, qkv, where = build(name), 3 * random_qkv(sum(lengths), seed), segments_of(lengths)
        out, scores = mixer(qkv, where), mixer.gene_scores(qkv, where)
        start = int(where.cu_seqlens[-2])
        alone = mixer(qkv[start:], segments_of(lengths[-1:]))
        # padding of enormous keys and values, in any place of the cell, is not read
        order = torch.randperm(lengths[-1] + 3, generator=torch.Generator().manual_seed(seed))
        padded = torch.cat([qkv[start:], 30 * random_qkv(3, seed + 1)])[order]
        kept = order < lengths[-1]
        masked = mixer(padded, segments_of([len(order)]), kept)
        shuffled = torch.randperm(lengths[-1], generator=torch.Generator().manual_seed(seed))
        moved = torch.cat([qkv[:start], qkv[start:][shuffled]])
        tolerance = 1e-7 if name == "gelu" else 1e-11
        for found, expected in (
            (out[start:], alone),
            (masked[kept], alone[order[kept]]),
            (mixer(moved, where)[start:], out[start:][shuffled]),
            (mixer.gene_scores(moved, where)[start:], scores[start:][shuffled]),
        ):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_compat_reads_batch_mates_and_padding() -> None:
    mixer, qkv = build("exp compat"), random_qkv(16)
    alone = mixer(qkv[:8], segments_of([8]))
    assert 1e-4 < off(mixer(qkv, segments_of([8, 8]))[:8], alone) < 1
    kept = torch.arange(16) < 8
    padded, other = qkv.clone(), qkv.clone()
    other[8:] *= 1.5
    found = [mixer(x, segments_of([16]), kept)[:8] for x in (padded, other)]
    assert off(found[0], alone) > 0.1  # masked keys stay in the normaliser
    assert off(found[0], found[1]) > 1e-2


@pytest.mark.parametrize("kernel", ["exp", "elu"])
def test_far_keys_and_queries_stay_finite(kernel: str) -> None:
    """A query whose features meet none of the keys' gets their mean, not 0 / 0; gradients are finite."""
    mixer = build("exp" if kernel == "exp" else "linear").float()
    qkv = random_qkv(12, dtype=torch.float32)
    qkv[:6, 0] *= 100
    qkv[6:, 1] *= 100
    out, grad = with_gradient(lambda x: mixer(x, segments_of([12])), qkv)
    assert out.isfinite().all()
    assert grad.isfinite().all()
    assert out.abs().max() <= qkv[:, 2].abs().max() * (1 + 1e-5)  # weights are not negative, and sum to 1


@pytest.mark.parametrize("name", ["exp", "exp compat", "linear", "none", "gelu"])
def test_bf16_under_autocast_keeps_features_in_float32(name: str) -> None:
    """Handed bf16, and under autocast, the result is that of the same numbers in float32, rounded once."""
    mixer, where = build(name).float(), segments_of(RAGGED)
    qkv = random_qkv(sum(RAGGED)).bfloat16()
    exact = with_gradient(lambda x: mixer(x, where), qkv.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradient(lambda x: mixer(x, where), qkv)
    assert [x.dtype for x in found] == [torch.bfloat16] * 2
    assert off(found[0], exact[0]) < 2**-8
    assert off(found[1], exact[1]) < 2**-6  # d_out and out are bf16 too


@pytest.mark.parametrize("scaling", ["constant", "norms"])
def test_redraw_follows_the_generator_and_is_orthogonal(scaling: Any) -> None:
    mixers = [Favor(PerformerConfig(head_width=16, features=40, scaling=scaling)) for _ in range(2)]
    assert not torch.equal(mixers[0].projection, mixers[1].projection)
    for mixer in mixers:
        mixer.redraw(torch.Generator().manual_seed(5))
    assert torch.equal(mixers[0].projection, mixers[1].projection)
    before = mixers[0].projection.clone()
    mixers[0].redraw(torch.Generator().manual_seed(6))
    assert not torch.equal(mixers[0].projection, before)
    for block in before.split(16):
        products = block @ block.t()
        lengths = products.diagonal().sqrt()
        assert (products - products.diagonal().diag()).abs().max() < 1e-5
        if scaling == "constant":
            torch.testing.assert_close(lengths, torch.full_like(lengths, 4.0))
    assert (lengths.std() > 0.1) == (scaling == "norms")


def test_directions_have_no_preferred_side() -> None:
    """QR alone would turn the first direction of every block away from the first axis."""
    w = orthogonal_directions(2000, 4, False, torch.Generator().manual_seed(0))
    assert (w.mean(0).abs() < 4 * 2 / 2000**0.5).all()
    assert abs(float(w[::4, 0].mean())) < 0.2


def test_features_estimate_softmax() -> None:
    """With Gaussian lengths on average: the error falls with the number of features. Constant ones are biased."""
    torch.manual_seed(0)
    qkv, where = 0.5 * random_qkv(200), segments_of([200])
    exact = Softmax()(qkv, where)
    errors = []
    for m in (64, 1024, 16384):
        mixer, draw = (
            Favor(PerformerConfig(head_width=D, features=m, scaling="norms")).double(),
            torch.Generator().manual_seed(0),
        )
        found = []
        for _ in range(5):
            mixer.redraw(draw)
            found.append(off(mixer(qkv, where), exact))
        errors.append(sum(found) / 5)
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.03


@pytest.mark.parametrize(("name", "forward", "backward"), [("exp", 8 * M, 16 * M), ("linear", 4 * D, 8 * D)])
def test_flops_are_counted(name: str, forward: int, backward: int) -> None:
    mixer, qkv = build(name), random_qkv(20).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = mixer(qkv, segments_of([20]))
    assert counter.get_total_flops() == forward * 20 * H * D
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == backward * 20 * H * D


@pytest.mark.parametrize("name", IN_BLOCKS)
def test_the_operators_have_shapes_for_the_compiler(name: str) -> None:
    mixer, qkv = build(name), random_qkv(9).requires_grad_()
    cells = segments_of([4, 5])
    rest = (mixer.projection, cells.cu_seqlens, None, cells.longest, mixer.kernel, mixer.compat)  # type: ignore[union-attr]
    torch.library.opcheck(torch.ops.scfm.feature_attention, (qkv.detach(), *rest))


def test_memory_of_a_call_does_not_hold_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept for the backward is far less than one tensor of features."""
    mixer = Favor(PerformerConfig(head_width=16, features=256))
    qkv, kept = torch.randn(500, 3, 4, 16, requires_grad=True), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mixer(qkv, segments_of([500]))
    assert sum(tensor.numel() for tensor in kept) < 500 * 4 * 256 / 2


def test_segments_of_a_pack() -> None:
    batch = random_pack([4, 3], [2, 3])
    segments = Segments.of(batch)
    assert segments.cu_seqlens.tolist() == [0, 4, 7]
    assert [(run.start, run.cells, run.length) for run in segments.runs(7)] == [(0, 1, 4), (4, 1, 3)]
    equal = Segments(torch.tensor([0, 4, 8]).int(), 4)
    assert [(run.start, run.cells, run.length) for run in equal.runs(8)] == [(0, 2, 4)]


def test_recipes_name_mixers() -> None:
    favor = build_mixer(ModelConfig())
    assert isinstance(favor, Favor)
    assert favor.projection.shape == (266, 64)
    assert list(favor.state_dict()) == ["projection"]
    linear = build_mixer(ModelConfig(mixer="linear"))
    assert isinstance(linear, LinearAttention)
    assert not linear.state_dict()
    assert isinstance(build_mixer(ModelConfig(mixer="softmax")), Softmax)
    assert "compat, kernel=relu, features=5, head_width=8" in repr(
        Favor(PerformerConfig("compat", 8, 5, kernel="relu"))
    )
    with pytest.raises(ScfmError, match="0 features of heads of width 1"):
        Favor(PerformerConfig(head_width=1))
