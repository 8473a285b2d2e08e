"""Stored cases of scGPT: its weights through our converter, its inputs as packs, its outputs to compare."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from scfm.checkpoints.native import ModelFiles, load_weights
from scfm.checkpoints.scgpt.reading import to_native
from scfm.data.batch import PackedBatch
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.model import ScGPT

MASK, CATEGORY_MASK = -1, 52
VOCABULARY = Vocabulary(
    [Gene.of(None, f"g{i:03}") for i in range(197)] + [Gene(s) for s in ("<pad>", "<cls>", "<eoc>")]
)

# what `pytest -m golden --parity` prints: the largest absolute error of each case by dtype, or how else it is compared
ERRORS: dict[str, dict[str, float]] = {}
OTHERWISE: dict[str, str] = {}


class Case:
    """A stored case: its model with the original's weights, its inputs and outputs.

    Args:
        folder: the case.
        dtype: float64, compared to 1e-6 relative, or float32, compared to 2e-5 absolute.
        padded_batches: whether to compute as scGPT does on padded batches.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, *, padded_batches: bool = False, **options: Any) -> None:
        self.folder, self.dtype = folder, dtype
        self.sizes = json.loads((folder / "config.json").read_text())["constructor"]
        self.files, weights = self.native(load_file(folder / "state_dict.safetensors"))
        self.files = replace(self.files, model=replace(self.files.model, padded_batches=padded_batches, **options))
        network = self.files.build()
        load_weights(network, weights, str(folder))
        assert isinstance(network, ScGPT)
        self.model = network.to(dtype).eval()
        self.inputs = load_file(folder / "inputs.safetensors")

    def native(self, state: dict[str, Tensor]) -> tuple[ModelFiles, dict[str, Tensor]]:
        """Pass tensors under scGPT's names through the converter."""
        files, weights, _ = to_native(state, args_of(self.sizes), VOCABULARY)
        return files, weights

    def expected(self, name: str = "outputs") -> dict[str, Tensor]:
        exact = self.folder / f"{name}_f64.safetensors"
        return load_file(
            exact if self.dtype == torch.float64 and exact.exists() else self.folder / f"{name}.safetensors"
        )

    def check(self, ours: Tensor, theirs: Tensor) -> None:
        """Compare to the case's tolerance, and note the error for the table."""
        compare(self.folder.name, ours, theirs.to(ours.dtype))


def compare(case: str, ours: Tensor, theirs: Tensor) -> None:
    """float64 to 1e-6 relative, float32 to 2e-5 absolute; the largest absolute error is noted for the table."""
    assert ours.numel() > 0
    exact = ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, **({"rtol": 1e-6, "atol": 1e-9} if exact else {"rtol": 0.0, "atol": 2e-5}))
    errors, dtype = ERRORS.setdefault(case, {}), "float64" if exact else "float32"
    errors[dtype] = max(errors.get(dtype, 0.0), float((ours - theirs).abs().max()))


def parity_table() -> str:
    """Return the largest errors of the cases that ran, as Markdown."""
    lines = ["| case | max error float64 | max error float32 |", "|---|---|---|"]
    for case in sorted(ERRORS.keys() | OTHERWISE.keys()):
        both = [f"{ERRORS[case][d]:.1e}" if d in ERRORS.get(case, {}) else "" for d in ("float64", "float32")]
        lines.append(
            f"| {case} | {OTHERWISE[case]} | |" if case in OTHERWISE else f"| {case} | {both[0]} | {both[1]} |"
        )
    return "\n".join(lines)


def args_of(sizes: dict[str, Any]) -> dict[str, Any]:
    """Say with the keys of args.json what a case's constructor says."""
    names = {
        "embsize": "d_model",
        "nheads": "nhead",
        "nlayers": "nlayers",
        "d_hid": "d_hid",
        "n_layers_cls": "nlayers_cls",
    }
    args = {key: sizes[name] for key, name in names.items()} | {
        "n_bins": 51,
        "mask_value": MASK,
        "MVC": sizes.get("do_mvc", False),
    }
    return args | {"USE_CLS": True, "USE_GENERATIVE_TRAINING": sizes.get("use_generative_training", False)} | sizes


def pack(
    genes: list[Tensor],
    values: list[Tensor],
    targets: list[Tensor],
    n_known: Tensor,
    lengths: Tensor,
    **conditions: Any,
) -> PackedBatch:
    """Pack cells."""
    return PackedBatch(
        genes=torch.cat(genes).int(),
        values=torch.cat(values).float(),
        targets=torch.cat(targets).float(),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        n_known=n_known.int(),
        cell_id=torch.arange(len(lengths)),
        total_cells=len(lengths),
        total_unknown=int((lengths - n_known).sum()),
        **conditions,
    )


def generative_batch(inputs: dict[str, Tensor], *, known_only: bool = False) -> PackedBatch:
    """Pack scGPT's padded known (pcpt) and unknown (gen) genes."""
    known, unknown = ~inputs["pcpt_key_padding_mask"], ~inputs["gen_key_padding_mask"]
    unknown = unknown & (not known_only)
    genes, values, targets = [], [], []
    for cell in range(len(known)):
        n_unknown = int(unknown[cell].sum())
        genes += [inputs["pcpt_genes"][cell][known[cell]], inputs["gen_genes"][cell][unknown[cell]]]
        values += [inputs["pcpt_values"][cell][known[cell]], torch.full((n_unknown,), float(MASK))]
        targets += [inputs["pcpt_values"][cell][known[cell]], inputs["gen_expr_target"][cell][unknown[cell]]]
    return pack(genes, values, targets, known.sum(1), known.sum(1) + unknown.sum(1))


def full_batch(inputs: dict[str, Tensor], hidden: Tensor) -> tuple[PackedBatch, list[Tensor]]:
    """Pack scGPT's padded genes, hidden ones last; also return the original column of each token, by cell."""
    real = ~inputs["src_key_padding_mask"]
    columns = [
        torch.cat([(known & ~hides).nonzero()[:, 0], (known & hides).nonzero()[:, 0]])
        for known, hides in zip(real, hidden, strict=True)
    ]

    def by_cell(name: str) -> list[Tensor]:
        return [row[column] for row, column in zip(inputs[name], columns, strict=True)]

    targets = by_cell("target_values" if "target_values" in inputs else "values")
    cell_conditions, gene_conditions = {}, {}
    if "batch_labels" in inputs:
        cell_conditions["batch"] = inputs["batch_labels"].long()
    if "celltype_labels" in inputs:
        cell_conditions["label"] = inputs["celltype_labels"].long()
    for name, stored in (("modality", "mod_types"), ("perturbation", "input_pert_flags")):
        if stored in inputs:
            gene_conditions[name] = torch.cat(by_cell(stored)).long()
    conditions = {"cell_conditions": cell_conditions, "gene_conditions": gene_conditions}
    n_known = (real & ~hidden).sum(1)
    return pack(by_cell("src"), by_cell("values"), targets, n_known, real.sum(1), **conditions), columns


def by_token(padded: Tensor, columns: list[Tensor]) -> Tensor:
    """Pick from a padded output what stands at the tokens of a pack, in pack order."""
    return torch.cat([row[column] for row, column in zip(padded, columns, strict=True)])
