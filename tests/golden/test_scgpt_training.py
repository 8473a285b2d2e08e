"""Whole training steps against the original: every loss, every gradient, every running average."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scgpt_cases import MASK, Case, compare, full_batch, generative_batch
from torch import Tensor

from scfm.evaluation.metrics import relative_error
from scfm.objectives import CLS, DAR, ECS, GEP, GEPC, CellPrompt

pytestmark = pytest.mark.golden

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])


def stored(case: Case, what: str) -> dict[str, Tensor]:
    return load_file(case.folder / f"{what}_{'f64' if case.dtype == torch.float64 else 'f32'}.safetensors")


def check_gradients(case: Case) -> None:
    """Compare every parameter's gradient, on the scale of its largest; the stored ones pass through the converter.

    A shift before a batch norm has no gradient but rounding: none is scaled by less than 1 % of the largest of all.
    """
    weights = load_file(case.folder / "state_dict.safetensors")
    theirs = {**weights, **stored(case, "grads")}  # buffers have no gradient
    _, expected = case.native({name: tensor.to(case.dtype) for name, tensor in theirs.items()})
    parameters = dict(case.model.named_parameters())
    floor = max(expected[name].abs().max() for name in parameters) / 100
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        scale = torch.maximum(expected[name].abs().max(), floor)
        compare(case.folder.name, parameter.grad / scale, expected[name] / scale)


@DTYPES
def test_train_step_pretrain(shared: Path, dtype: torch.dtype) -> None:
    case = Case(shared / "golden/scgpt/train_step_pretrain", dtype, dropout=0.0)
    losses, batch = stored(case, "losses"), generative_batch(case.inputs)
    output = case.model.train()(batch)
    output.predictions["cell_prompt"] = case.model(batch, cell_prompt=output.cell.detach()).predictions["gep"]
    objectives = {"gep_gen": GEP(51), "mvc_gen": GEPC(51), "gen_from_cell_emb": CellPrompt(51)}
    ours = {name: objective.loss(batch, output)[0] for name, objective in objectives.items()}
    total = sum(ours.values())
    for name, loss in (ours | {"total": total}).items():
        torch.testing.assert_close(loss, losses[name].to(dtype), rtol=1e-6, atol=0)
    total.backward()
    check_gradients(case)


@DTYPES
def test_train_step_finetune(shared: Path, dtype: torch.dtype) -> None:
    """All seven fine-tuning losses at once, DSBN in training mode (with scGPT's counting of padding) among them."""
    case = Case(shared / "golden/scgpt/train_step_finetune", dtype, padded_batches=True, dropout=0.0)
    losses = stored(case, "losses")
    batch, _ = full_batch(case.inputs, case.inputs["values"] == MASK)
    output = case.model.train()(batch)
    names = [str(i) for i in range(5)]
    gep, gep_part = GEP(51, nonzero=True).loss(batch, output)
    gepc, gepc_part = GEPC(51, nonzero=True).loss(batch, output)
    ours = {
        "gep": gep - gep_part["gep_nonzero"],
        "gep_zero": gep_part["gep_nonzero"],
        "gepc": gepc - gepc_part["gepc_nonzero"],
        "gepc_zero": gepc_part["gepc_nonzero"],
        "cls": CLS(names).loss(batch, output)[0],
        "ecs": ECS(0.8).loss(output.cell),
        "dab": DAR("batch", names[:3]).loss(batch, output)[0],
    }
    hidden = batch.predicted
    error = relative_error(output.predictions["gep"].detach().numpy(), batch.targets[hidden].numpy())
    assert error == pytest.approx(losses["mre"].item(), rel=1e-6 if dtype == torch.float64 else 1e-5)
    total = gep + gepc + ours["cls"] + 10 * ours["ecs"] + ours["dab"]
    for name, loss in (ours | {"total": total}).items():
        torch.testing.assert_close(loss, losses[name].to(dtype), rtol=1e-6 if dtype == torch.float64 else 1e-5, atol=0)
    total.backward()
    check_gradients(case)
    weights = load_file(case.folder / "state_dict.safetensors")
    _, expected = case.native({**weights, **stored(case, "buffers_after")})
    for name, buffer in case.model.named_buffers():
        compare(case.folder.name, buffer.to(dtype), expected[name].to(dtype))
