"""Properties that hold for every pack: a cell is a set of genes, and its batch mates are not its business."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import N_BINS, N_GENES, PAD, random_pack
from torch import Tensor

from scfm.data.batch import PackedBatch
from scfm.model import ScGPT
from scfm.model.heads import HeadSpec
from scfm.model.output import ModelOutput
from scfm.recipe import ModelConfig


@st.composite
def cells(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Lengths and known tokens of one to five cells."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    return lengths, [draw(st.integers(1, length)) for length in lengths]


models = st.builds(
    lambda attention, value, backend, projection, norm, modality, pooling: ModelConfig(
        width=8,
        heads=2,
        layers=2,
        hidden=8,
        attention=attention,
        value_encoder=value,
        backend=backend,
        unknown_output_projection=projection,
        input_norm=norm,
        domain="donor" if norm == "domain" else None,
        modality=modality,
        cell_embedding=pooling,
    ),
    st.sampled_from(["generative", "full"]),
    st.sampled_from(["continuous", "category"]),
    st.sampled_from(["flash_cpu", "dense"]),
    st.booleans(),
    st.sampled_from(["none", "batch", "domain"]),
    st.sampled_from([None, "assay"]),
    st.sampled_from(["cls", "mean", "weighted"]),
)


def build(config: ModelConfig) -> ScGPT:
    torch.manual_seed(0)
    heads = [
        HeadSpec("gep", "gep", nonzero=True),
        HeadSpec("gepc", "gepc", nonzero=True),
        HeadSpec("annotation", "cls", 2),
        HeadSpec("dar", "domain", 2),
    ]
    model = ScGPT(config, N_GENES + 2, PAD, N_BINS, {"donor": 2}, {"assay": 2}, heads).double().eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            torch.nn.init.normal_(buffer)
    return model


def with_conditions(batch: PackedBatch) -> PackedBatch:
    """Give every cell a donor, unknown for some, and every gene an assay."""
    return replace(
        batch, cell_conditions={"donor": batch.cell_id % 3 - 1}, gene_conditions={"assay": batch.genes.long() % 2}
    )


def alone(batch: PackedBatch, cell: int) -> PackedBatch:
    """The pack that holds one cell of another pack."""
    start, stop = batch.cu_seqlens[cell : cell + 2].tolist()
    return replace(
        batch,
        genes=batch.genes[start:stop],
        values=batch.values[start:stop],
        targets=batch.targets[start:stop],
        cu_seqlens=torch.tensor([0, stop - start], dtype=torch.int32),
        n_known=batch.n_known[cell : cell + 1],
        cell_id=batch.cell_id[cell : cell + 1],
    )


def filled_up(batch: PackedBatch, room: int) -> PackedBatch:
    """Fill a pack up with a pseudo-cell of `<pad>` tokens."""
    return replace(
        batch,
        genes=torch.cat([batch.genes, torch.full((room,), PAD, dtype=torch.int32)]),
        values=torch.cat([batch.values, torch.zeros(room)]),
        targets=torch.cat([batch.targets, torch.zeros(room)]),
        cu_seqlens=torch.cat([batch.cu_seqlens, batch.cu_seqlens[-1:] + room]),
        n_known=torch.cat([batch.n_known, torch.ones(1, dtype=torch.int32)]),
        cell_id=torch.cat([batch.cell_id, torch.tensor([-1])]),
    )


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(cells(), models)
def test_a_cell_is_the_same_alone_and_packed(cells: tuple[list[int], list[int]], config: ModelConfig) -> None:
    batch, model = random_pack(*cells), build(config)
    packed: ModelOutput = model(with_conditions(batch))
    singles = [model(with_conditions(alone(batch, cell))) for cell in range(batch.n_cells)]
    close(packed.cell, torch.cat([single.cell for single in singles]))
    close(packed.tokens, torch.cat([single.tokens for single in singles]))
    for name, prediction in packed.predictions.items():
        close(prediction, torch.cat([single.predictions[name] for single in singles]))


@settings(max_examples=25, deadline=None)
@given(cells(), models, st.randoms(use_true_random=False))
def test_gene_order_changes_nothing(cells: tuple[list[int], list[int]], config: ModelConfig, random) -> None:
    """Known genes among themselves and unknown genes among themselves are sets; tokens move with their genes."""
    batch, model = random_pack(*cells), build(config)
    order = []
    for start, stop, known in zip(
        batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:], batch.n_known.tolist(), strict=False
    ):
        seen, hidden = list(range(start + 1, start + known)), list(range(start + known, stop))
        random.shuffle(seen)
        random.shuffle(hidden)
        order += [start, *seen, *hidden]
    shuffled = replace(batch, genes=batch.genes[order], values=batch.values[order], targets=batch.targets[order])
    close(model(with_conditions(shuffled)).cell, model(with_conditions(batch)).cell)
    close(model(with_conditions(shuffled)).tokens, model(with_conditions(batch)).tokens[order])


@settings(max_examples=25, deadline=None)
@given(cells(), models.filter(lambda config: config.attention == "generative"))
def test_an_unknown_gene_is_invisible_to_every_other_token(
    cells: tuple[list[int], list[int]], config: ModelConfig
) -> None:
    batch, model = random_pack(*cells), build(config)
    unknown = batch.unknown_mask.nonzero()[:, 0].tolist()
    for position in unknown[:3]:
        other = batch.genes.clone()
        other[position] = (other[position] + 1) % N_GENES
        changed = (
            model(with_conditions(replace(batch, genes=other))).tokens != model(with_conditions(batch)).tokens
        ).any(-1)
        assert changed.nonzero()[:, 0].tolist() == [position]


@settings(max_examples=15, deadline=None)
@given(cells(), models, st.integers(1, 9))
def test_a_pseudo_cell_changes_nothing(cells: tuple[list[int], list[int]], config: ModelConfig, room: int) -> None:
    """Room filled up with <pad> tokens neither changes other cells nor is predicted."""
    batch, model = random_pack(*cells), build(config)
    filled = filled_up(batch, room)
    plain, padded = model(with_conditions(batch)), model(with_conditions(filled))
    close(padded.cell[:-1], plain.cell)
    for name in ("gep", "gepc"):
        close(padded.predictions[name], plain.predictions[name])


@settings(max_examples=15, deadline=None)
@given(cells(), models.filter(lambda config: config.input_norm != "none"), st.integers(1, 9))
def test_a_pseudo_cell_is_not_counted_when_norms_learn(
    cells: tuple[list[int], list[int]], config: ModelConfig, room: int
) -> None:
    batch = random_pack(*cells)
    filled = filled_up(batch, room)
    plain, padded = build(replace(config, dropout=0.0)).train(), build(replace(config, dropout=0.0)).train()
    close(padded(with_conditions(filled)).cell[:-1], plain(with_conditions(batch)).cell)
    for ours, theirs in zip(padded.buffers(), plain.buffers(), strict=True):
        close(ours, theirs)
