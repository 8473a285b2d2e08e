"""The benchmark's dense-mask peer computes what scfm computes: else the two would not be comparable."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scgpt_cases import Case, generative_batch

from scfm.data.batch import PackedBatch
from scfm.model import ScGPT
from scfm.objectives import Objective, build_objectives
from scfm.recipe import ModelConfig, ObjectiveConfig

BENCH = Path(__file__).parents[1] / "scripts" / "bench"
N_TOKENS, PAD = 50, 0
CELLS = {"ragged": [(5, 3), (1, 6), (9, 0), (4, 12)], "even": [(6, 5), (6, 5), (6, 5)]}  # known, unknown


def script(name: str) -> ModuleType:
    """Import a file of scripts/bench, which is no part of the package."""
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def peer() -> ModuleType:
    return script("dense_peer")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return script("train_vs_dense")


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


@pytest.mark.golden
@pytest.mark.parametrize("arrangement", ["mask", "streams"])
@pytest.mark.parametrize("name", ["generative_pcpt_gen", "generative_pcpt_gen_nopad"])
@torch.no_grad()
def test_stored_outputs_of_the_original(peer: ModuleType, shared: Path, name: str, arrangement: str) -> None:
    case = Case(shared / "golden/scgpt" / name, torch.float32)
    theirs = peer.DenseMaskModel(case.files.model, len(case.files.vocabulary), case.files.vocabulary.pad, arrangement)
    theirs.load_scfm(case.model.state_dict())
    streams = peer.Streams.of(generative_batch(case.inputs), case.files.vocabulary.pad)
    expected, real = case.expected(), ~case.inputs["gen_key_padding_mask"]
    first = theirs.eval()(streams)
    second = theirs(streams, cell_prompt=first.cell, read_cell=False)
    n_known = case.inputs["pcpt_genes"].shape[1]
    for ours, stored in (
        (first.values, expected["gen_preds"]),
        (first.from_cell, expected["mvc_output"][:, n_known:]),
        (second.values, expected["second_gen_preds"]),
    ):
        said = ours[~streams.unknown_padding]  # cell by cell, as in the stored outputs
        torch.testing.assert_close(said, stored[real], atol=2e-5, rtol=0)
    torch.testing.assert_close(first.cell, expected["cell_emb"], atol=2e-5, rtol=0)


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


@pytest.mark.parametrize("side", ["peer", "scfm"])
def test_every_timed_step_runs(bench: ModuleType, side: str) -> None:
    shape = bench.Shape(width=8, layers=1, heads=2, tokens=7, cells=2)
    batch = bench.made_up_batch(shape)
    for kind in bench.kinds(side, "default", "cpu"):
        bench.build_step(kind, shape, batch, "cpu")()


def test_both_sides_of_the_benchmark_have_one_loss(bench: ModuleType) -> None:
    shape = bench.Shape(width=8, layers=1, heads=2, tokens=7, cells=2)
    config = ModelConfig(width=8, heads=2, layers=1, hidden=8, dropout=0.0, unknown_output_projection=False)
    batch = bench.made_up_batch(shape)
    ours, our_loss = bench.scfm_loss(bench.Kind("scfm", "fp32", 0.0, "default"), config, batch, "cpu")
    for model in bench.PEERS:
        theirs, their_loss = bench.peer_loss(bench.Kind(model, "fp32", 0.0, "default"), config, batch, "cpu")
        theirs.load_scfm(ours.state_dict())
        torch.testing.assert_close(their_loss(), our_loss())


def test_what_runs_out_of_memory_is_said(bench: ModuleType) -> None:
    kinds = bench.kinds("peer", "default", "cuda") + bench.kinds("scfm", "default", "cuda")
    times = {kind: [bench.Timing(0.5, 2.0)] * 3 for kind in kinds}
    times[kinds[0]] = [None] * 3
    rows = bench.summarise(times, cells=4, device="cuda")
    assert rows[0]["cells_per_second_median"] is rows[0]["peak_gib"] is None
    assert all(row["cells_per_second_median"] == 8 and row["peak_gib"] == 2 for row in rows[1:])
    assert all(set(row["times"].values()) <= {1.0} for row in rows)
    assert "out of memory" in bench.table(rows)
