"""Properties of scBERT in its correct mode: a cell is a set of genes, and its batch mates are not its business."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import N_BINS, N_GENES, PAD, bin_pack
from torch import Tensor

from scfm.data.batch import PackedBatch
from scfm.model import ScBERT
from scfm.model.heads import HeadSpec
from scfm.recipe import ModelConfig, PerformerConfig

HEADS = [HeadSpec("masked_bin", "bins", N_BINS + 1), HeadSpec("annotation", "genes", 2), HeadSpec("dar", "domain", 2)]


@st.composite
def cells(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Lengths and known tokens of one to five cells; in half of all packs the cells are of one length."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    if draw(st.booleans()):
        lengths = lengths[:1] * len(lengths)
    return lengths, [draw(st.integers(1, length)) for length in lengths]


models = st.builds(
    lambda mixer, kernel, norm, reversible, pooling: ModelConfig(
        name="scbert",
        width=8,
        heads=2,
        layers=2,
        hidden=8,
        attention="full",
        cell_embedding=pooling,
        mixer=mixer,
        performer=PerformerConfig(head_width=8, features=16, kernel=kernel, norm=norm, reversible=reversible),
    ),
    st.sampled_from(["favor", "linear", "softmax"]),
    st.sampled_from(["exp", "relu", "none"]),
    st.sampled_from(["layer", "scale", "rezero"]),
    st.booleans(),
    st.sampled_from(["cls", "mean", "weighted"]),
)


def build(config: ModelConfig) -> ScBERT:
    torch.manual_seed(0)
    model = ScBERT(config, N_GENES + 2, PAD, N_BINS, {}, {}, HEADS).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_norm.g"):
            torch.nn.init.constant_(parameter, 0.7)  # or ReZero's blocks would hardly speak
    return model


def alone(batch: PackedBatch, cell: int) -> PackedBatch:
    """The pack that holds one cell of another pack."""
    start, stop = batch.cu_seqlens[cell : cell + 2].tolist()
    assert batch.targets is not None
    return replace(
        batch,
        genes=batch.genes[start:stop],
        values=batch.values[start:stop],
        targets=batch.targets[start:stop],
        cu_seqlens=torch.tensor([0, stop - start], dtype=torch.int32),
        n_known=batch.n_known[cell : cell + 1],
        cell_id=batch.cell_id[cell : cell + 1],
        longest=0,
    )


def filled_up(batch: PackedBatch, room: int) -> PackedBatch:
    """Fill a pack up with a pseudo-cell of `<pad>` tokens."""
    return replace(
        batch,
        genes=torch.cat([batch.genes, torch.full((room,), PAD, dtype=torch.int32)]),
        values=torch.cat([batch.values, torch.zeros(room)]),
        targets=None,
        cu_seqlens=torch.cat([batch.cu_seqlens, batch.cu_seqlens[-1:] + room]),
        n_known=torch.cat([batch.n_known, torch.ones(1, dtype=torch.int32)]),
        cell_id=torch.cat([batch.cell_id, torch.tensor([-1])]),
        longest=0,
    )


def padded_by(batch: PackedBatch, room: int) -> tuple[PackedBatch, Tensor]:
    """Append hidden genes to every cell; return also which tokens were there before."""
    own, parts = [], []
    for start, stop in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:], strict=False):
        parts.append(torch.cat([torch.arange(start, stop), torch.full((room,), start)]))
        own.append(torch.arange(stop - start + room) < stop - start)
    origin, kept = torch.cat(parts), torch.cat(own)
    grown = replace(
        batch,
        genes=torch.where(kept, batch.genes[origin], PAD).int(),
        values=torch.where(kept, batch.values[origin], N_BINS),
        targets=None,
        cu_seqlens=batch.cu_seqlens + room * torch.arange(batch.n_cells + 1, dtype=torch.int32),
        longest=0,
    )
    return grown, kept


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(cells(), models)
def test_a_cell_is_the_same_alone_and_packed(cells: tuple[list[int], list[int]], config: ModelConfig) -> None:
    batch, model = bin_pack(*cells), build(config)
    packed = model(batch)
    singles = [model(alone(batch, cell)) for cell in range(batch.n_cells)]
    close(packed.cell, torch.cat([single.cell for single in singles]))
    close(packed.tokens, torch.cat([single.tokens for single in singles]))
    for name, prediction in packed.predictions.items():
        close(prediction, torch.cat([single.predictions[name] for single in singles]))


@settings(max_examples=40, deadline=None)
@given(cells(), models, st.randoms(use_true_random=False))
def test_gene_order_changes_nothing(cells: tuple[list[int], list[int]], config: ModelConfig, random) -> None:
    """Known genes among themselves and hidden genes among themselves are sets; tokens move with their genes."""
    batch, model = bin_pack(*cells), build(config)
    assert batch.targets is not None
    order = []
    for start, stop, known in zip(
        batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:], batch.n_known.tolist(), strict=False
    ):
        seen, hidden = list(range(start + 1, start + known)), list(range(start + known, stop))
        random.shuffle(seen)
        random.shuffle(hidden)
        order += [start, *seen, *hidden]
    shuffled = replace(batch, genes=batch.genes[order], values=batch.values[order], targets=batch.targets[order])
    plain, moved = model(batch), model(shuffled)
    close(moved.cell, plain.cell)
    close(moved.tokens, plain.tokens[order])
    close(moved.predictions["annotation"], plain.predictions["annotation"])


@settings(max_examples=20, deadline=None)
@given(cells(), models, st.integers(1, 9))
def test_a_pseudo_cell_changes_nothing(cells: tuple[list[int], list[int]], config: ModelConfig, room: int) -> None:
    """Room filled up with <pad> tokens neither changes other cells nor is predicted."""
    batch, model = bin_pack(*cells), build(config)
    plain, filled = model(batch), model(filled_up(batch, room))
    close(filled.cell[:-1], plain.cell)
    close(filled.predictions["masked_bin"], plain.predictions["masked_bin"])
    close(filled.predictions["annotation"][:-1], plain.predictions["annotation"])


@settings(max_examples=20, deadline=None)
@given(cells(), models, st.integers(1, 5))
def test_masked_tokens_change_nothing(cells: tuple[list[int], list[int]], config: ModelConfig, room: int) -> None:
    """Padding that is told to be padding is not read, whatever the mixer."""
    batch, model = bin_pack(*cells), build(config)
    grown, own = padded_by(batch, room)
    close(model.backbone(grown, own)[0][own], model.backbone(batch)[0])


def test_compat_breaks_these_properties() -> None:
    """What the original does: one stabiliser for the whole pack, so batch mates show."""
    config = ModelConfig(
        name="scbert",
        width=8,
        heads=2,
        layers=2,
        hidden=8,
        attention="full",
        performer=PerformerConfig("compat", 8, 16),
    )
    batch, model = bin_pack([9, 9], [5, 5]), build(config)
    with torch.no_grad():
        for block in model.backbone.blocks:
            block.qkv.weight.mul_(3)
    difference = model(batch).tokens[:9] - model(alone(batch, 0)).tokens
    assert difference.abs().max() > 1e-5
