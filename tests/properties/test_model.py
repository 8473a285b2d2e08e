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
from scfm.model.scgpt import ModelOutput
from scfm.recipe import ModelConfig


@st.composite
def cells(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Lengths and known tokens of one to five cells."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    return lengths, [draw(st.integers(1, length)) for length in lengths]


models = st.builds(
    lambda attention, value, backend, projection: ModelConfig(
        width=8,
        heads=2,
        layers=2,
        hidden=8,
        attention=attention,
        value_encoder=value,
        backend=backend,
        unknown_output_projection=projection,
    ),
    st.sampled_from(["generative", "full"]),
    st.sampled_from(["continuous", "category"]),
    st.sampled_from(["flash_cpu", "dense"]),
    st.booleans(),
)


def build(config: ModelConfig) -> ScGPT:
    torch.manual_seed(0)
    heads = [HeadSpec("gep", "gep"), HeadSpec("gepc", "gepc"), HeadSpec("annotation", "cls", 2)]
    return ScGPT(config, N_GENES + 2, PAD, N_BINS, {}, {}, heads).double().eval()


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


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(cells(), models)
def test_a_cell_is_the_same_alone_and_packed(cells: tuple[list[int], list[int]], config: ModelConfig) -> None:
    batch, model = random_pack(*cells), build(config)
    packed: ModelOutput = model(batch)
    singles = [model(alone(batch, cell)) for cell in range(batch.n_cells)]
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
    close(model(shuffled).cell, model(batch).cell)
    close(model(shuffled).tokens, model(batch).tokens[order])


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
        changed = (model(replace(batch, genes=other)).tokens != model(batch).tokens).any(-1)
        assert changed.nonzero()[:, 0].tolist() == [position]


@settings(max_examples=15, deadline=None)
@given(cells(), models, st.integers(1, 9))
def test_a_pseudo_cell_changes_nothing(cells: tuple[list[int], list[int]], config: ModelConfig, room: int) -> None:
    """Room filled up with <pad> tokens neither changes other cells nor is predicted."""
    batch, model = random_pack(*cells), build(config)
    filled = replace(
        batch,
        genes=torch.cat([batch.genes, torch.full((room,), PAD, dtype=torch.int32)]),
        values=torch.cat([batch.values, torch.zeros(room)]),
        targets=torch.cat([batch.targets, torch.zeros(room)]),
        cu_seqlens=torch.cat([batch.cu_seqlens, batch.cu_seqlens[-1:] + room]),
        n_known=torch.cat([batch.n_known, torch.ones(1, dtype=torch.int32)]),
        cell_id=torch.cat([batch.cell_id, torch.tensor([-1])]),
    )
    plain, padded = model(batch), model(filled)
    close(padded.cell[:-1], plain.cell)
    for name in ("gep", "gepc"):
        close(padded.predictions[name], plain.predictions[name])
