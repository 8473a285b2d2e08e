"""The released scGPT 0.2.4 itself loads what scfm exports, all of it, and computes the same.

Runs where $SCFM_SCGPT is a folder made by `pip install --no-deps scgpt==0.2.4 --target FOLDER`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scgpt_cases import by_token, full_batch
from scgpt_models import FORMS, a_model
from torch import Tensor

from scfm.checkpoints.native import ModelFiles, load_weights
from scfm.checkpoints.scgpt.limits import scgpt_class
from scfm.checkpoints.scgpt.reading import read_scgpt
from scfm.checkpoints.scgpt.writing import to_scgpt, write_scgpt
from scfm.model import ScGPT

pytestmark = pytest.mark.peer

SCRIPT = Path(__file__).parents[2] / "original_scgpt.py"
EMBED = """
import sys, anndata, torch
from scgpt.tasks import embed_data
torch.backends.mha.set_fastpath_enabled(False)
cells = anndata.read_h5ad(sys.argv[2])
embedded = embed_data(cells, sys.argv[1], gene_col=sys.argv[4], device="cpu", use_fast_transformer=False)
embedded.obsm["X_scGPT"].tofile(sys.argv[3])
"""


@pytest.fixture(scope="module")
def original(shared: Path) -> dict[str, str]:
    """The environment in which Python finds scGPT."""
    place = os.environ.get("SCFM_SCGPT", "")
    if not Path(place, "scgpt").is_dir():
        pytest.skip("no scGPT: set SCFM_SCGPT to a folder made by pip install --no-deps scgpt==0.2.4 --target FOLDER")
    path = [place, str(shared / "prototypes/scgpt_shims")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    version = "from importlib.metadata import version; print(version('scgpt'))"  # importing it takes many seconds
    done = subprocess.run([sys.executable, "-c", version], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["0.2.4"], done.stderr
    return environment


def some_inputs(files: ModelFiles) -> dict[str, Tensor]:
    """Return three cells of 12, 9 and 6 tokens, padded as scGPT pads them; all values are known."""
    generator = torch.Generator().manual_seed(1)
    n, length, n_genes = 3, 12, files.vocabulary.n_genes
    src = torch.stack([torch.randperm(n_genes, generator=generator)[:length] for _ in range(n)])
    values = torch.randint(1, files.tokens.n_bins, (n, length), generator=generator).float()
    src[:, 0], values[:, 0] = files.vocabulary.cls, 0.0
    if files.model.value_encoder == "category":
        values[:, 0] = files.tokens.n_bins  # where our table of bins has <cls>
    padding = torch.arange(length) >= torch.tensor([[12], [9], [6]])
    src[padding], values[padding] = files.vocabulary.pad, 0.0
    inputs = {"src": src, "values": values, "src_key_padding_mask": padding}
    if files.model.input_norm != "none":  # scGPT takes the first cell's domain; it wants labels for a batch norm, too
        inputs["batch_labels"] = torch.tensor([2, 2, 2])
    elif files.cell_conditions:
        inputs["batch_labels"] = torch.tensor([0, 2, 1])
    if files.model.modality:
        inputs["mod_types"] = torch.randint(0, 2, (n, length), generator=generator).masked_fill(padding, 2)
    if files.gene_conditions and not files.model.modality:
        inputs["input_pert_flags"] = torch.randint(0, 2, (n, length), generator=generator).masked_fill(padding, 2)
    return inputs


@torch.no_grad()
def ours(files: ModelFiles, weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], list]:
    """Return what scfm computes, under the names of scGPT's outputs, and the columns of the tokens of each cell."""
    network = files.build()
    load_weights(network, weights, "the model")
    assert isinstance(network, ScGPT)
    network.eval()
    batch, columns = full_batch(inputs, torch.zeros_like(inputs["src"], dtype=torch.bool))
    if files.cell_conditions:
        batch = replace(batch, cell_conditions={"donor": batch.cell_conditions["batch"]})
    output = network(batch)
    predicted = replace(batch, n_known=torch.zeros_like(batch.n_known))
    genes = network.backbone.gene_embedding(batch.genes)
    said = {"cell_emb": output.cell}
    for task, theirs in (("gep", "mlm"), ("gepc", "mvc")):
        if task in network.heads:
            spec, head = network.specs[task], network.heads[task]
            if task == "gep":
                values = network.read_tokens(spec, head, output.tokens, predicted)
            else:
                values = network.read_cells(spec, head, genes, output.cell, predicted)
            said[f"{theirs}_output"] = values.values
            if values.nonzero is not None:
                said[f"{theirs}_zero_probs"] = values.nonzero.sigmoid()
    for task, theirs in (("annotation", "cls_output"), ("dar", "dab_output")):
        if task in output.predictions:
            said[theirs] = output.predictions[task]
    return said, columns


@pytest.fixture(scope="module")
def computed(original: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each form of model: what scfm exported, inputs, and what scGPT computed from them."""
    root = tmp_path_factory.mktemp("forms")
    for form in FORMS:
        files, weights = a_model(form)
        write_scgpt(root / form / "exported", to_scgpt(files, weights))
        save_file(some_inputs(files), root / form / "inputs.safetensors")
    command = [sys.executable, str(SCRIPT), *(str(root / form) for form in FORMS)]
    done = subprocess.run(command, env=original, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("form", FORMS)
def test_the_package_computes_the_same_from_an_export(computed: Path, form: str) -> None:
    files, weights = a_model(form)
    loaded = json.loads((computed / form / "loaded.json").read_text())
    assert loaded["class"] == scgpt_class(files)
    # scGPT 0.2.4 has no flag of unknown genes (its pretraining code has), and always a class decoder
    assert set(loaded["skipped"]) <= {"flag_encoder.weight"}
    classless = all(head.kind != "cls" for head in files.heads)
    assert {name.split(".")[0] for name in loaded["lacking"]} == ({"cls_decoder"} if classless else set())
    theirs = load_file(computed / form / "outputs.safetensors")
    said, columns = ours(files, weights, load_file(computed / form / "inputs.safetensors"))
    if loaded["class"] == "TransformerGenerator":
        del said["cell_emb"]  # which that model keeps to itself
    assert theirs.keys() - {"loss_ecs"} == said.keys()
    errors = {}
    for name, mine in said.items():
        expected = by_token(theirs[name], columns) if name.startswith(("mlm_", "mvc_")) else theirs[name]
        assert mine.std() > 0.01, name
        errors[name] = float((mine - expected).abs().max())
    print(form, {name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < 1e-5


def test_embed_data_reads_an_export(original: dict[str, str], shared: Path, tmp_path: Path) -> None:
    """A published checkpoint through scfm and back: scGPT's own zero-shot embedding is what it was."""
    folder = shared / "golden/scgpt/checkpoint_tiny"
    files, weights, _ = read_scgpt(folder)
    write_scgpt(tmp_path / "back", to_scgpt(files, weights))
    command = [sys.executable, "-c", EMBED, str(tmp_path / "back"), str(folder / "cells.h5ad"), str(tmp_path / "out")]
    column = json.loads((folder / "expected.json").read_text()).get("gene_col", "index")
    done = subprocess.run([*command, column], env=original, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = load_file(folder / "expected_embed_data.safetensors")["cell_embeddings_unit_norm"].numpy()
    embedded = np.fromfile(tmp_path / "out", np.float32).reshape(expected.shape)
    assert np.abs(embedded - expected).max() < 1e-5
