"""The model against stored outputs of the original scGPT: same weights, same inputs, same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from scfm.data.batch import PackedBatch
from scfm.model import ScGPT
from scfm.model.heads import HeadSpec
from scfm.model.scgpt import ModelOutput
from scfm.objectives import ECS, GEP, GEPC, CellPrompt
from scfm.recipe import ModelConfig

pytestmark = pytest.mark.golden

# scGPT's names for our modules, longest prefix first
NAMES = {
    "backbone.gene_embedding.embedding.": "encoder.embedding.",
    "backbone.gene_embedding.norm.": "encoder.enc_norm.",
    "backbone.value_encoder.embedding.": "value_encoder.embedding.",
    "backbone.value_encoder.linear": "value_encoder.linear",
    "heads.gep.linear1.": "decoder.fc.0.",
    "heads.gep.linear2.": "decoder.fc.2.",
    "heads.gep.out.": "decoder.fc.4.",
    "heads.gepc.query.": "mvc_decoder.gene2query.",
    "heads.gepc.project.": "mvc_decoder.W.",
    "heads.annotation.hidden.0.0.": "cls_decoder._decoder.0.",
    "heads.annotation.hidden.0.2.": "cls_decoder._decoder.2.",
    "heads.annotation.hidden.1.0.": "cls_decoder._decoder.3.",
    "heads.annotation.hidden.1.2.": "cls_decoder._decoder.5.",
    "heads.annotation.out.": "cls_decoder.out_layer.",
}


def original(name: str, category: bool) -> str:
    """Translate a parameter name of ours into scGPT's."""
    if name.startswith("backbone.value_encoder.norm."):
        return name.replace("backbone.value_encoder.norm.", f"value_encoder.{'enc_norm' if category else 'norm'}.")
    for ours, theirs in NAMES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    layer, part = name.removeprefix("backbone.blocks.").split(".", 1)
    part = part.replace("qkv.", "self_attn.Wqkv.").replace("out_proj.", "self_attn.out_proj.")
    return f"transformer_encoder.layers.{layer}.{part}"


class Case:
    """A stored case: its model with the original's weights, its inputs and outputs."""

    def __init__(self, folder: Path, dtype: torch.dtype, **options: str) -> None:
        self.folder = folder
        self.exact = dtype == torch.float64
        sizes = json.loads((folder / "config.json").read_text())["constructor"]
        self.weights = {
            name.replace("in_proj_", "Wqkv."): tensor
            for name, tensor in load_file(folder / "state_dict.safetensors").items()
        }
        self.inputs = load_file(folder / "inputs.safetensors")
        generative = options.get("attention", "generative") == "generative"
        self.category = options.get("value_encoder") == "category"
        config = ModelConfig(
            width=sizes["d_model"],
            heads=sizes["nhead"],
            layers=sizes["nlayers"],
            hidden=sizes["d_hid"],
            unknown_output_projection=not generative,
            **options,
        )
        heads = [HeadSpec("gep", "gep")]
        heads += [HeadSpec("gepc", "gepc")] if sizes.get("do_mvc") else []
        heads += [HeadSpec("annotation", "cls", sizes["n_cls"])] if sizes["n_cls"] > 1 else []
        self.model = ScGPT(config, sizes["ntoken"], 197, 51, {}, {}, heads).to(dtype).eval()
        state = {
            name: self.weights["flag_encoder.weight"][1]
            if name == "backbone.unknown_flag"
            else self.weights[original(name, self.category)]
            for name in self.model.state_dict()
        }
        self.model.load_state_dict(state, strict=True)

    def expected(self, name: str) -> Tensor:
        return load_file(self.folder / f"outputs{'_f64' if self.exact else ''}.safetensors")[name]

    def check(self, ours: Tensor, theirs: Tensor) -> None:
        """float64 to 1e-6 relative, float32 to 2e-5 absolute."""
        assert ours.numel() > 0
        tolerance = {"rtol": 1e-6, "atol": 1e-9} if self.exact else {"rtol": 0.0, "atol": 2e-5}
        torch.testing.assert_close(ours, theirs.to(ours.dtype), **tolerance)


def generative_batch(inputs: dict[str, Tensor]) -> PackedBatch:
    """Pack scGPT's padded known (pcpt) and unknown (gen) genes."""
    known, unknown = ~inputs["pcpt_key_padding_mask"], ~inputs["gen_key_padding_mask"]
    genes, values, targets = [], [], []
    for cell in range(len(known)):
        n_unknown = int(unknown[cell].sum())
        genes += [inputs["pcpt_genes"][cell][known[cell]], inputs["gen_genes"][cell][unknown[cell]]]
        values += [inputs["pcpt_values"][cell][known[cell]], torch.full((n_unknown,), -1.0)]
        targets += [inputs["pcpt_values"][cell][known[cell]], inputs["gen_expr_target"][cell][unknown[cell]]]
    return pack(genes, values, targets, known.sum(1), known.sum(1) + unknown.sum(1))


def full_batch(inputs: dict[str, Tensor], hidden: Tensor) -> tuple[PackedBatch, list[Tensor]]:
    """Pack scGPT's padded genes, hidden ones last; also return the original column of each token, by cell."""
    real = ~inputs["src_key_padding_mask"]
    columns = [
        torch.cat([(known & ~hides).nonzero()[:, 0], (known & hides).nonzero()[:, 0]])
        for known, hides in zip(real, hidden, strict=True)
    ]
    genes, values, targets = (
        [row[column] for row, column in zip(inputs[name], columns, strict=True)]
        for name in ("src", "values", "target_values")
    )
    return pack(genes, values, targets, (real & ~hidden).sum(1), real.sum(1)), columns


def pack(
    genes: list[Tensor], values: list[Tensor], targets: list[Tensor], n_known: Tensor, lengths: Tensor
) -> PackedBatch:
    return PackedBatch(
        genes=torch.cat(genes).int(),
        values=torch.cat(values).float(),
        targets=torch.cat(targets).float(),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        n_known=n_known.int(),
        cell_id=torch.arange(len(lengths)),
        total_cells=len(lengths),
        total_unknown=int((lengths - n_known).sum()),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("name", ["generative_pcpt_gen", "generative_pcpt_gen_nopad"])
@pytest.mark.parametrize("backend", ["flash_cpu", "dense"])
def test_generative_forward(shared: Path, name: str, dtype: torch.dtype, backend: str) -> None:
    case = Case(shared / "golden/scgpt" / name, dtype, backend=backend)
    batch = generative_batch(case.inputs)
    first = case.model(batch)
    second = case.model(batch, cell_prompt=first.cell)
    unknown = ~case.inputs["gen_key_padding_mask"]
    n_pcpt = case.inputs["pcpt_genes"].shape[1]
    case.check(first.cell, case.expected("cell_emb"))
    case.check(first.predictions["gep"], case.expected("gen_preds")[unknown])
    case.check(first.predictions["gepc"], case.expected("mvc_output")[:, n_pcpt:][unknown])
    case.check(second.predictions["gep"], case.expected("second_gen_preds")[unknown])
    case.check(second.cell, case.expected("second_cell_emb"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_pretraining_step(shared: Path, dtype: torch.dtype) -> None:
    """All three pretraining losses and the gradient of every parameter."""
    case = Case(shared / "golden/scgpt/train_step_pretrain", dtype, dropout=0.0)
    suffix = "f64" if case.exact else "f32"
    losses = load_file(case.folder / f"losses_{suffix}.safetensors")
    grads = load_file(case.folder / f"grads_{suffix}.safetensors")
    batch = generative_batch(case.inputs)
    output = case.model.train()(batch)
    output.predictions["cell_prompt"] = case.model(batch, cell_prompt=output.cell.detach()).predictions["gep"]
    objectives = {"gep_gen": GEP(51), "mvc_gen": GEPC(51), "gen_from_cell_emb": CellPrompt(51)}
    ours = {name: objective.loss(batch, output)[0] for name, objective in objectives.items()}
    for name, loss in ours.items():
        torch.testing.assert_close(loss, losses[name].to(loss.dtype), rtol=1e-6, atol=0)
    sum(ours.values()).backward()
    for name, parameter in case.model.named_parameters():
        theirs = grads["flag_encoder.weight"][1] if name == "backbone.unknown_flag" else grads[original(name, False)]
        scale = float(theirs.abs().max())
        torch.testing.assert_close(parameter.grad / scale, theirs / scale, rtol=0, atol=1e-8 if case.exact else 2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mvc_continuous", {}),
        ("mvc_continuous_nopad", {}),
        ("category_values", {"value_encoder": "category"}),
        ("scaling_values", {"value_encoder": "scaling"}),
        ("flash_postnorm", {}),
        ("flash_prenorm", {"norm": "pre"}),
    ],
)
def test_full_attention_forward(shared: Path, name: str, options: dict[str, str], dtype: torch.dtype) -> None:
    """Every value encoder and both norms, through the decoders."""
    case = Case(shared / "golden/scgpt" / name, dtype, attention="full", **options)
    # all genes are predicted; a category encoder reads hidden ones as hidden, so there only those that were
    everything = torch.arange(case.inputs["src"].shape[1]).expand_as(case.inputs["src"]) > 0
    batch, columns = full_batch(case.inputs, case.inputs["values"] == 52 if case.category else everything)
    output = case.model(batch)
    hidden = [column[int(n) :] for column, n in zip(columns, batch.n_known, strict=True)]
    case.check(output.cell, case.expected("cell_emb"))
    for ours, theirs in (("gep", "mlm_output"), ("gepc", "mvc_output")):
        rows = [case.expected(theirs)[cell][column] for cell, column in enumerate(hidden)]
        case.check(output.predictions[ours], torch.cat(rows))
    tokens = [case.expected("transformer_output")[cell][column] for cell, column in enumerate(columns)]
    case.check(output.tokens, torch.cat(tokens))
    if name != "scaling_values":
        case.check(output.predictions["annotation"], case.expected("cls_output"))


@pytest.mark.parametrize(("name", "style"), [("cell_emb_avgpool", "mean"), ("cell_emb_wpool", "weighted")])
def test_cell_embedding_styles(shared: Path, name: str, style: str) -> None:
    """Pooling over a cell's tokens; scGPT also pools padding, so only its cells without padding compare."""
    case = Case(shared / "golden/scgpt" / name, torch.float64, attention="full", cell_embedding=style)
    batch, _ = full_batch(case.inputs, torch.zeros_like(case.inputs["src"], dtype=torch.bool))  # scGPT pools all
    unpadded = ~case.inputs["src_key_padding_mask"].any(1)
    assert unpadded.any()
    case.check(case.model(batch).cell[unpadded], case.expected("cell_emb")[unpadded])


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.8])
def test_elastic_cell_similarity(shared: Path, threshold: float) -> None:
    folder = shared / "golden/scgpt/losses"
    cells = load_file(folder / "inputs.safetensors")["cell_emb"]
    expected = load_file(folder / "outputs.safetensors")[f"ecs_{threshold}"]
    torch.testing.assert_close(ECS(threshold).loss(cells), expected, rtol=1e-6, atol=0)


def test_masked_squared_error(shared: Path) -> None:
    folder = shared / "golden/scgpt/losses"
    inputs = load_file(folder / "inputs.safetensors")
    mask = inputs["mask"].flatten()
    order = torch.cat([(~mask).nonzero()[:, 0], mask.nonzero()[:, 0]])  # one cell, hidden genes last
    target, prediction = inputs["target"].flatten()[order], inputs["input"].flatten()[order]
    n_known, length = (~mask).sum()[None], torch.tensor([len(mask)])
    batch = pack([torch.zeros(len(mask))], [target], [target], n_known, length)
    output = ModelOutput(torch.empty(0), torch.empty(0), {"gep": prediction[int(n_known) :]})
    expected = load_file(folder / "outputs.safetensors")["masked_mse"]
    torch.testing.assert_close(GEP(51).loss(batch, output)[0], expected, rtol=1e-6, atol=0)
