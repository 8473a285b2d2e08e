"""The model against stored outputs of scGPT: same weights through the converter, same inputs, same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scgpt_cases import CATEGORY_MASK, MASK, Case, by_token, compare, full_batch, generative_batch, pack
from torch import Tensor

from scfm.data.batch import PackedBatch
from scfm.evaluation.metrics import relative_error
from scfm.model.heads import HeadSpec, build_head
from scfm.model.output import ModelOutput
from scfm.objectives import CCE, ECS, GEP

pytestmark = pytest.mark.golden

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])


def everywhere(case: Case, output: ModelOutput, batch: PackedBatch) -> dict[str, Tensor]:
    """Return what every head says at every token, under the names of scGPT's outputs."""
    model = case.model
    whole = replace(batch, n_known=torch.zeros_like(batch.n_known))  # all tokens are predicted
    genes = model.backbone.gene_embedding(batch.genes)
    said = {"cell_emb": output.cell, "transformer_output": output.tokens, "gene_token_embs": genes}
    for task, theirs in (("gep", "mlm"), ("gepc", "mvc")):
        if task in model.heads:
            spec, head = model.specs[task], model.heads[task]
            if task == "gep":
                values = model.read_tokens(spec, head, output.tokens, whole)
            else:
                values = model.read_cells(spec, head, genes, output.cell, whole)
            said |= {f"{theirs}_output": values.values, f"{theirs}_pred_unsampled": values.values}
            if values.nonzero is not None:
                said[f"{theirs}_zero_probs"] = values.nonzero.sigmoid()
    for task, theirs in (("annotation", "cls_output"), ("dar", "dab_output")):
        if task in output.predictions:
            said[theirs] = output.predictions[task]
    return said | {"loss_ecs": ECS(case.sizes.get("ecs_threshold", 0.3)).loss(output.cell)}


BY_TOKEN = ("transformer_output", "gene_token_embs", "mlm_", "mvc_")


@DTYPES
@pytest.mark.parametrize(
    "name",
    [
        "mvc_continuous",
        "mvc_continuous_nopad",
        "mvc_continuous_zeroprob",
        "category_values",
        "scaling_values",
        "cell_emb_avgpool",
        "cell_emb_wpool",
        "batch_dsbn_zeroprob_dab",
        "batch_dsbn_mixed_labels",
        "plain_batchnorm",
        "multiomic_mod_batch",
        "multiomic_mod_only",
        "perturb_generator",
        "perturb_generator_adaptive_mvc",
        "perturb_generator_zeroprob",
        "flash_postnorm",
        "flash_prenorm",
    ],
)
@torch.no_grad()
def test_every_output_at_every_token(shared: Path, name: str, dtype: torch.dtype) -> None:
    """All that the original stored, at all tokens that are not padding."""
    # what depends on padding or on the first cell's label there needs the compatibility option here
    padded = name in ("cell_emb_avgpool", "cell_emb_wpool", "batch_dsbn_mixed_labels")
    case = Case(shared / "golden/scgpt" / name, dtype, padded_batches=padded)
    values = case.inputs["values"]
    hidden = values == (CATEGORY_MASK if case.files.model.value_encoder == "category" else MASK)
    batch, columns = full_batch(case.inputs, hidden)
    output = case.model(batch)
    said = everywhere(case, output, batch)
    for key, theirs in case.expected().items():
        case.check(said[key], by_token(theirs, columns) if key.startswith(BY_TOKEN) else theirs)
    # what the model hands to objectives is the same at the unknown genes
    for task in ("gep", "gepc"):
        if task in case.model.heads and len(batch.predicted):
            everything = said["mlm_output" if task == "gep" else "mvc_output"]
            torch.testing.assert_close(output.predictions[task], everything[batch.predicted])


@torch.no_grad()
def test_mixed_batches_are_normed_row_by_row(shared: Path) -> None:
    """scfm's own rule: each cell by its own label, which is what the original gives it in a batch of that label."""
    folder = shared / "golden/scgpt/batch_dsbn_mixed_labels"
    ours, original = (Case(folder, torch.float64, padded_batches=rule) for rule in (False, True))
    batch, _ = full_batch(ours.inputs, torch.zeros_like(ours.inputs["src"], dtype=torch.bool))
    mixed = ours.model(batch).cell
    for cell in range(batch.n_cells):
        alone = {name: tensor[cell : cell + 1] for name, tensor in ours.inputs.items()}
        single, _ = full_batch(alone, torch.zeros_like(alone["src"], dtype=torch.bool))
        torch.testing.assert_close(mixed[cell], original.model(single).cell[0])


@DTYPES
@pytest.mark.parametrize("name", ["generative_pcpt_gen", "generative_pcpt_gen_nopad"])
@pytest.mark.parametrize("backend", ["flash_cpu", "dense"])
@torch.no_grad()
def test_generative_forward(shared: Path, name: str, dtype: torch.dtype, backend: str) -> None:
    """Known and unknown genes, the second pass from the cell embedding, and known genes alone."""
    case = Case(shared / "golden/scgpt" / name, dtype, backend=backend)
    expected, batch = case.expected(), generative_batch(case.inputs)
    first = case.model(batch)
    second = case.model(batch, cell_prompt=first.cell)
    known, unknown = ~case.inputs["pcpt_key_padding_mask"], ~case.inputs["gen_key_padding_mask"]
    n_pcpt = known.shape[1]
    said, again = everywhere(case, first, batch), everywhere(case, second, batch)
    is_known = ~batch.unknown_mask
    case.check(first.cell, expected["cell_emb"])
    case.check(first.predictions["gep"], expected["gen_preds"][unknown])
    case.check(said["mlm_output"][is_known], expected["pcpt_preds"][known])
    case.check(first.predictions["gepc"], expected["mvc_output"][:, n_pcpt:][unknown])
    case.check(said["mvc_output"][is_known], expected["mvc_output"][:, :n_pcpt][known])
    case.check(second.cell, expected["second_cell_emb"])
    case.check(second.predictions["gep"], expected["second_gen_preds"][unknown])
    case.check(again["mlm_output"][is_known], expected["second_pcpt_preds"][known])
    only = generative_batch(case.inputs, known_only=True)
    alone = case.model(only)
    said = everywhere(case, alone, only)
    case.check(alone.cell, expected["pcptonly_cell_emb"])
    case.check(said["mlm_output"], expected["pcptonly_pcpt_preds"][known])
    case.check(said["mvc_output"], expected["pcptonly_mvc_output"][known])
    if case.dtype == torch.float64:
        reference = load_file(case.folder / "outputs_reference_f64.safetensors")["transformer_output"]
        case.check(first.tokens[is_known], reference[:, :n_pcpt][known])
        case.check(first.tokens[~is_known], reference[:, n_pcpt:][unknown])


@torch.no_grad()
def test_mvc_decoder_styles(shared: Path) -> None:
    """The four decoders alone; the original's model crashes with two of them, ours takes all."""
    folder = shared / "golden/scgpt/mvc_decoder_styles"
    inputs, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    state = load_file(folder / "state_dict.safetensors")
    cells, genes = inputs["cell_emb"], inputs["gene_embs"]
    names = {"gene2query": "query", "W": "project", "fc1": "hidden", "hidden_activation": "activation", "fc2": "out"}
    styles = {
        "inner_product": "product",
        "inner_product_detach": "detached product",
        "concat_query": "concat",
        "sum_query": "sum",
    }
    assert outputs.keys() == styles.keys()
    for style, query in styles.items():
        own = {key.removeprefix(f"{style}."): tensor for key, tensor in state.items() if key.startswith(f"{style}.")}
        head = build_head(HeadSpec("gepc", "gepc", query=query), 32, 32, 51)  # type: ignore[arg-type]
        head.load_state_dict({".".join([names[key.split(".")[0]], key.split(".")[1]]): own[key] for key in own})
        cell_of_gene = torch.arange(len(cells)).repeat_interleave(genes.shape[1])
        compare("mvc_decoder_styles", head(genes.flatten(0, 1), cells, cell_of_gene).values, outputs[style].flatten())


@torch.no_grad()
def test_cce(shared: Path) -> None:
    case = Case(shared / "golden/scgpt/cce", torch.float32)
    batch, _ = full_batch(case.inputs, torch.zeros_like(case.inputs["src"], dtype=torch.bool))
    first, second = case.model(batch).cell, case.model(batch).cell
    case.check(first, case.expected()["cell_emb"])
    case.check(CCE().loss(first, second), case.expected()["loss_cce"])


def test_losses(shared: Path) -> None:
    folder = shared / "golden/scgpt/losses"
    inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    for threshold in (0.0, 0.3, 0.8):
        compare("losses", ECS(threshold).loss(inputs["cell_emb"]), expected[f"ecs_{threshold}"])
    mask = inputs["mask"].flatten().bool()
    order = torch.cat([(~mask).nonzero()[:, 0], mask.nonzero()[:, 0]])  # one cell, hidden genes last
    target, prediction, probability = (inputs[name].flatten()[order] for name in ("target", "input", "probs"))
    n_known, length = (~mask).sum()[None], torch.tensor([len(mask)])
    batch = pack([torch.zeros(len(mask))], [target], [target], n_known, length)
    predictions = {"gep": prediction, "gep_nonzero": probability.logit()}
    predictions = {name: said[int(n_known) :] for name, said in predictions.items()}
    loss, metrics = GEP(51, nonzero=True).loss(batch, ModelOutput(torch.empty(0), torch.empty(0), predictions))
    compare("losses", loss - metrics["gep_nonzero"], expected["masked_mse"])
    compare("losses", metrics["gep_nonzero"], expected["nll_bernoulli"])
    error = relative_error(predictions["gep"].numpy(), target[int(n_known) :].numpy())
    # zero targets make it 101,522: compared as a ratio
    compare("losses", torch.tensor(error) / expected["masked_relative_error"], torch.tensor(1.0))
