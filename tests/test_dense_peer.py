"""The benchmark's dense-mask peer computes what scfm computes: else the two would not be comparable."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from scfm.data.batch import PackedBatch
from scfm.model import ScGPT
from scfm.objectives import Objective, build_objectives
from scfm.recipe import ModelConfig, ObjectiveConfig

BENCH = Path(__file__).parents[1] / "scripts" / "bench"
N_TOKENS, PAD = 50, 0
CELLS = {"ragged": [(5, 3), (1, 6), (9, 0), (4, 12)], "even": [(6, 5), (6, 5), (6, 5)]}  # known, unknown


@pytest.fixture(scope="module")
def peer() -> ModuleType:
    """scripts/bench/dense_peer.py, which is no part of the package."""
    sys.path.insert(0, str(BENCH))
    try:
        import dense_peer
    finally:
        sys.path.remove(str(BENCH))
    return dense_peer


def a_batch(cells: list[tuple[int, int]], pseudo_cell: bool = False) -> PackedBatch:
    torch.manual_seed(1)
    lengths = torch.tensor([sum(cell) for cell in cells])
    n_known = torch.tensor([known for known, _ in cells], dtype=torch.int32)
    n_tokens = int(lengths.sum())
    targets = torch.randint(1, 51, (n_tokens,)).float()
    batch = PackedBatch(
        genes=torch.randint(1, N_TOKENS, (n_tokens,), dtype=torch.int32),
        values=targets.clone(),
        targets=targets,
        cu_seqlens=torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
        n_known=n_known,
        cell_id=torch.arange(len(cells)),
        total_cells=len(cells),
        total_unknown=int((lengths - n_known).sum()),
    )
    batch.values[batch.unknown_mask] = -1
    batch.values[batch.cu_seqlens[:-1].long()] = -2
    if pseudo_cell:
        batch.cell_id[-1] = -1
        batch.total_unknown -= cells[-1][1]
    return batch


def both_sides(peer: ModuleType, arrangement: str) -> tuple[ScGPT, torch.nn.Module, list[Objective]]:
    torch.manual_seed(0)
    config = ModelConfig(
        width=32, heads=4, layers=3, hidden=32, dropout=0.0, unknown_output_projection=False, attention="generative"
    )
    objectives = build_objectives([ObjectiveConfig(name) for name in ("gep", "gepc", "cell_prompt")], n_bins=51)
    heads = {head.task: head for objective in objectives for head in objective.heads()}
    ours = ScGPT(config, N_TOKENS, PAD, 51, {}, {}, list(heads.values()))
    for parameter in ours.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    theirs = peer.DenseMaskModel(config, N_TOKENS, PAD, arrangement)
    theirs.load_scfm(ours.state_dict())
    return ours, theirs, objectives


@pytest.mark.parametrize("arrangement", ["mask", "streams"])
@pytest.mark.parametrize(("cells", "pseudo"), [("ragged", False), ("ragged", True), ("even", False)])
def test_predictions_are_equal(peer: ModuleType, arrangement: str, cells: str, pseudo: bool) -> None:
    ours, theirs, _ = both_sides(peer, arrangement)
    batch = a_batch(CELLS[cells], pseudo)
    streams = peer.Streams.of(batch, PAD)
    real = ~streams.unknown_padding
    first, other = ours(batch), theirs(streams)
    prompt = first.cell.detach()
    second = ours(batch, cell_prompt=prompt)
    other_second = theirs(streams, cell_prompt=prompt[batch.real_cells], read_cell=False)
    assert streams.padded == (cells == "ragged")
    assert not torch.allclose(first.predictions["gep"], second.predictions["gep"], atol=1e-2)
    torch.testing.assert_close(other.values[real], first.predictions["gep"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other.from_cell[real], first.predictions["gepc"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other.cell, first.cell[batch.real_cells], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other_second.values[real], second.predictions["gep"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arrangement", ["mask", "streams"])
def test_loss_and_gradients_are_equal(peer: ModuleType, arrangement: str) -> None:
    ours, theirs, objectives = both_sides(peer, arrangement)
    batch = a_batch(CELLS["ragged"])
    output = ours(batch)
    output.predictions["cell_prompt"] = ours(batch, cell_prompt=output.cell.detach()).predictions["gep"]
    loss = sum(objective.loss(batch, output)[0] for objective in objectives)
    other = peer.pretraining_loss(theirs, peer.Streams.of(batch, PAD))
    torch.testing.assert_close(other, loss)
    loss.backward()
    other.backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        theirs_here = gradients[name.removeprefix("backbone.")].grad
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(theirs_here, parameter.grad, atol=1e-5 * max(largest, 1), rtol=0, msg=name)


@pytest.mark.parametrize("arrangement", ["mask", "streams"])
@pytest.mark.parametrize("cells", ["ragged", "even"])
def test_everything_lies_on_one_device(peer: ModuleType, arrangement: str, cells: str) -> None:
    """A tensor left on the CPU would fail beside those of the meta device, as it would beside those of a GPU."""
    _, theirs, _ = both_sides(peer, arrangement)
    streams = peer.Streams.of(a_batch(CELLS[cells]), PAD).to("meta")
    loss = peer.pretraining_loss(theirs.to("meta").train(), streams)
    loss.backward()
    assert loss.device.type == "meta"
    assert all(parameter.grad is not None for parameter in theirs.parameters())
