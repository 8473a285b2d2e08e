"""The encoder on padded cells equals the model on packed ones, in every form that it takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from scfm.checkpoints.native import ModelFiles
from scfm.checkpoints.onnx import inputs_of, trial_packs
from scfm.data.tokens import TokenConfig
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.errors import ScfmError
from scfm.model.padded_encoder import PaddedEncoder
from scfm.recipe import ModelConfig, PerformerConfig

GENES = [f"G{i:02}" for i in range(40)]
SMALL: dict[str, Any] = {"width": 16, "heads": 2, "layers": 2, "hidden": 24, "dropout": 0.1}
SCBERT = SMALL | {"name": "scbert", "attention": "full", "cell_embedding": "mean"}


def files_of(model: ModelConfig, **tokens: Any) -> ModelFiles:
    vocabulary = Vocabulary.from_genes([Gene.of(None, name) for name in GENES])
    flags = {"pathway": ["none", "cycle", "stress"]} if model.name == "scgpt" else {}
    return ModelFiles(
        model,
        TokenConfig(**{"max_genes": 30, "n_bins": 8} | tokens),
        "counts",
        vocabulary,
        [],
        cell_conditions={"batch": ["a", "b", "c"]} if model.name == "scgpt" else {},
        gene_conditions=flags,
        gene_tables={name: [i % 3 for i in range(len(vocabulary))] for name in flags},
    )


def scbert_files(**model: Any) -> ModelFiles:
    performer = PerformerConfig(**{"head_width": 8, "features": 12} | model.pop("performer", {}))
    return files_of(ModelConfig(**SCBERT | model, performer=performer), genes="all", values="log2", cls_value=0.0)


def network_of(files: ModelFiles) -> torch.nn.Module:
    """Return a network whose every tensor is drawn, running statistics of norms too."""
    torch.manual_seed(0)
    network = files.build().eval()
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not name.endswith("projection"):
            tensor.copy_(
                torch.rand_like(tensor) + 0.1 if "running_var" in name else tensor + 0.3 * torch.randn_like(tensor)
            )
    return network


FORMS = {
    "generative": files_of(ModelConfig(**SMALL)),
    "full-mean": files_of(ModelConfig(**SMALL, attention="full", cell_embedding="mean")),
    "weighted-pre-gelu": files_of(ModelConfig(**SMALL, cell_embedding="weighted", norm="pre", activation="gelu")),
    "categories": files_of(ModelConfig(**SMALL, value_encoder="category", unknown_output_projection=False)),
    "scaling-raw": files_of(ModelConfig(**SMALL, value_encoder="scaling", cell_conditions=["batch"]), values="raw"),
    "batch-norm": files_of(ModelConfig(**SMALL, input_norm="batch")),
    "domains": files_of(ModelConfig(**SMALL, input_norm="domain", domain="batch", modality="pathway")),
    "favor": scbert_files(),
    "linear": scbert_files(mixer="linear"),
    "softmax": scbert_files(mixer="softmax"),
    "relu-scale": scbert_files(performer={"kernel": "relu", "norm": "scale"}),
    "gelu-rezero": scbert_files(performer={"kernel": "gelu", "norm": "rezero", "qkv_bias": True}),
    "none-glu": scbert_files(performer={"kernel": "none", "glu": True}, cell_embedding="cls"),
    "reversible": scbert_files(performer={"reversible": True}),
}


@pytest.mark.parametrize("form", FORMS)
def test_it_equals_the_packed_model(form: str) -> None:
    files = FORMS[form]
    network = network_of(files)
    encoder = PaddedEncoder(network, files.model, files.gene_tables)
    for pack in trial_packs(files):
        with torch.inference_mode():
            expected = normalize(network(pack).cell, dim=-1)
            given = {name: torch.from_numpy(array) for name, array in inputs_of(pack, files).items()}
            found = encoder(**given)
            assert torch.allclose(found, expected, atol=2e-6), float((found - expected).abs().max())
            more = {name: x if x.dim() == 1 else torch.nn.functional.pad(x, (0, 3)) for name, x in given.items()}
            assert torch.allclose(encoder(**more), found, atol=2e-6)  # padding is not seen


def test_the_trial_tells_forms_apart() -> None:
    """Else any encoder would pass: cells differ, and so do domains."""
    files = FORMS["domains"]
    network = network_of(files)
    pack = trial_packs(files)[2]
    with torch.inference_mode():
        cells = normalize(network(pack).cell, dim=-1)
        moved = {"batch": (pack.cell_conditions["batch"] + 2) % 3}
        others = normalize(network(replace(pack, cell_conditions=moved)).cell, dim=-1)
    assert float((cells[0] - cells[1]).abs().max()) > 0.01
    assert float((cells - others).abs().max(1).values.min()) > 0.001


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (files_of(ModelConfig(**SMALL, attention="full", padded_batches=True)), "padded_batches"),
        (scbert_files(performer={"mode": "compat"}), "compat"),
    ],
)
def test_models_whose_cells_depend_on_their_mates_are_refused(files: ModelFiles, words: str) -> None:
    with pytest.raises(ScfmError, match=f"{words}.*batch mates"):
        PaddedEncoder(files.build(), files.model, files.gene_tables)
