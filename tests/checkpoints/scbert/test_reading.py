"""Checkpoints of scBERT give the numbers that it gives: the same weights and inputs, read through the converter."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scbert_cases import close, kernel_of, our_tensors
from scbert_models import NAMES, pack_of, vocabulary_of, write_checkpoint
from scgpt_folders import same
from torch import Tensor

from scfm.checkpoints.native import ModelFiles, load_weights
from scfm.checkpoints.scbert.reading import read_scbert, to_native
from scfm.checkpoints.scbert.writing import to_scbert
from scfm.data.vocabulary_files import read_vocabulary
from scfm.errors import ScfmError
from scfm.version import __version__

pytestmark = pytest.mark.golden

CASES = [
    "base_nog2v",
    "base_g2v",
    "default_dimhead64",
    "generalized_relu",
    "generalized_gelu",
    "no_projection",
    "scalenorm",
    "rezero",
    "glu",
    "reversible",
    "tied_qkvbias_chunk",
]


@pytest.fixture
def names(tmp_path: Path) -> Path:
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    return tmp_path / "names.txt"


@torch.no_grad()
def outputs(files: ModelFiles, weights: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """Return encodings, and logits of bins or classes, in scBERT's layout: their last token is our first."""
    network: Any = files.build().eval()
    load_weights(network, weights, "converted")
    batch = pack_of(ids, files.vocabulary)
    tokens, _ = network.backbone(batch)
    (head,) = files.heads
    logits = network(batch).predictions[head.task] if head.kind == "genes" else network.read_bins(head.task, tokens)
    n_cells, length = ids.shape
    found = {"encodings": tokens.view(n_cells, length, -1).roll(-1, 1)}
    return found | {"logits": logits if head.kind == "genes" else logits.view(n_cells, length, -1).roll(-1, 1)}


@pytest.mark.parametrize("name", ["tiny_pretrain_1.pth", "tiny_pretrain_1_ddp_prefix.pth"])
def test_a_pretrained_checkpoint(shared: Path, names: Path, name: str) -> None:
    folder = shared / "golden/scbert/checkpoint"
    files, weights, report = read_scbert(folder / name, vocabulary=names)
    stored = load_file(folder / "tensors.safetensors")
    found = outputs(files, weights, stored["input_ids"])
    for key in ("encodings", "logits"):
        close(found[key], stored[key])
    assert int(weights["backbone.since_redraw"]) == 1
    assert report.layout == ("layers, DDP" if "ddp" in name else "layers")
    assert report.left_behind == ["optimizer_state_dict", "scheduler_state_dict"]
    assert report.parts == {"token_emb": 1, "pos_emb": 1, "performer": 29, "norm": 2, "to_out": 2}
    assert "pos_emb.emb.weight is float64 in scBERT and float32 here, rounded to it by at most 4.3e-08" in report.notes
    converted = files.training_data["converted"]
    assert converted["beside"] == {"epoch": 1, "losses": pytest.approx(2.0169, abs=1e-4)}
    assert (converted["file"], converted["left_behind"]) == (name, report.left_behind)
    assert f"Converted by scfm {__version__} from the scBERT checkpoint {name}" in files.card
    assert "Cite scBERT (Yang et al., Nature Machine Intelligence 2022)" in files.card
    assert "| mixer | favor, compat, kernel exp, heads of width 16 |" in files.card


def test_a_fine_tuned_checkpoint(shared: Path, names: Path) -> None:
    folder = shared / "golden/scbert/checkpoint"
    labels = ["B", "CD4 T", "CD8 T", "NK", "monocyte"]
    files, weights, report = read_scbert(folder / "tiny_finetune_best.pth", vocabulary=names, labels=labels)
    stored = load_file(folder / "tiny_finetune_best.expected.safetensors")
    close(outputs(files, weights, stored["input_ids"])["logits"], stored["logits"])
    assert [(head.task, head.kind, head.labels) for head in files.heads] == [("annotation", "genes", labels)]
    assert not any("labels" in note for note in report.notes)
    files, _, report = read_scbert(folder / "tiny_finetune_best.pth", vocabulary=names)
    assert files.heads[0].labels == ["0", "1", "2", "3", "4"]
    assert "scBERT keeps no names of its 5 labels: they are numbered; --labels names them" in report.notes


def test_the_fine_tuning_head(shared: Path) -> None:
    folder = shared / "golden/scbert/finetune_head"
    stored = load_file(folder / "tensors.safetensors")
    files, weights, _ = to_native(load_file(folder / "state_dict.safetensors"), vocabulary_of())
    found = outputs(files, weights, stored["input_ids"])
    for key in ("encodings", "logits"):
        close(found[key], stored[key])


@pytest.mark.parametrize("name", CASES)
def test_every_form_is_told_by_its_tensors(shared: Path, name: str) -> None:
    folder = shared / "golden/scbert" / name
    said = json.loads((folder / "case.json").read_text())["meta"]["config"]
    state, stored = load_file(folder / "state_dict.safetensors"), load_file(folder / "tensors.safetensors")
    files, weights, report = to_native(state, vocabulary_of(), kernel=kernel_of(said))
    model = files.model
    assert (model.width, model.layers, model.heads) == (said["dim"], said["depth"], said["heads"])
    assert asdict(model.performer) == {
        "mode": "compat",
        "head_width": said.get("dim_head", 64),
        "features": said["nb_features"] or 266,
        "kernel": kernel_of(said),
        "scaling": "norms",
        "redraw_every": 1000,
        "norm": "scale" if "use_scalenorm" in said else "rezero" if "use_rezero" in said else "layer",
        "glu": said.get("ff_glu", False),
        "reversible": said.get("reversible", False),
        "tied": said.get("tie_embed", False),
        "qkv_bias": said.get("qkv_bias", False),
    }
    ours = our_tensors(state)  # the same translation, written for the tests of the model
    assert same({key: tensor for key, tensor in weights.items() if key in ours}, ours)
    assert weights.keys() - ours.keys() == {"backbone.gene_embedding.weight"}
    found = outputs(files, weights, stored["input_ids"])
    for key in ("encodings", "logits"):
        close(found[key], stored[key])
    built = to_scbert(files, weights).report.notes[0]
    assert "PerformerLM(num_tokens=7, max_seq_len=128, dim=40, depth=2, heads=4, dim_head=" in built
    switches = ("generalized_attention", "no_projection", "use_scalenorm", "use_rezero", "ff_glu", "reversible")
    for switch in (*switches, "tie_embed", "qkv_bias"):
        assert (f"{switch}=True" in built) == said.get(switch, False)
    assert ("g2v_position_emb=False" in built) == (not said["g2v_position_emb"])
    assert any("gene vectors are zeros" in note for note in report.notes) == (not said["g2v_position_emb"])


@pytest.mark.parametrize("n_classes", [None, 11])
def test_published_sizes(shared: Path, n_classes: int | None) -> None:
    said = json.loads((shared / "golden/scbert/published_state_dict_keys.json").read_text())
    shapes = {
        name: (key["shape"], getattr(torch, key["dtype"].removeprefix("torch."))) for name, key in said["keys"].items()
    }
    if n_classes:
        head = said["finetune_head"].items()
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("to_out.")}
        shapes |= {name: ([n_classes if n == "C" else n for n in shape], torch.float32) for name, shape in head}
    torch.manual_seed(0)
    state = {
        name: torch.randn(shape).to(kind) if kind.is_floating_point else torch.tensor(310, dtype=kind)
        for name, (shape, kind) in shapes.items()
    }
    vocabulary = read_vocabulary(shared / "data/gene_vocab/scbert_gene_order.txt")
    files, weights, report = to_native(state, vocabulary)
    model = files.model
    assert (model.width, model.layers, model.heads, model.hidden) == (200, 6, 10, 800)
    assert (model.performer.head_width, model.performer.features) == (64, 266)
    assert files.vocabulary.n_genes == files.tokens.max_genes == 16906
    if not n_classes:
        assert report.n_tensors == said["n_keys"]
        buffers = 6 * 266 * 64 + 1
        assert report.n_parameters == said["params_trainable"] + said["params_gene2vec"] + buffers
    assert "pos_emb.emb.weight is float64 in scBERT and float32 here, which holds its values exactly" in report.notes
    with torch.device("meta"):
        network = files.build()
    trains = sum(parameter.numel() for name, parameter in network.named_parameters() if not name.startswith("heads."))
    head = 7 * 200 + 7
    assert trains == said["params_trainable"] - head  # the table of gene vectors is not among them
    assert same(to_scbert(files, weights).state, state)


def test_how_cells_are_read(shared: Path) -> None:
    state = load_file(shared / "golden/scbert/base_g2v/state_dict.safetensors")
    state["pos_emb.emb.weight"][127] = 0.5  # of the empty token, which has none of gene2vec's
    files, weights, _ = to_native(state, vocabulary_of(), source="mine.pth")
    assert asdict(files.tokens) | {"seed": 0} == {
        "genes": "all",
        "max_genes": 127,
        "values": "log2",
        "n_bins": 6,
        "tie_policy": "left",
        "mask_ratios": (0.15,),
        "mask_candidates": "expressed",
        "mask_kept": 0.1,
        "cls_value": 0.0,
        "mask_value": 6.0,
        "seed": 0,
    }
    assert (files.value_kind, files.model.attention, files.model.dropout) == ("counts", "full", 0)
    assert files.model.gene_table == "mine.pth"
    table = weights["backbone.gene_embedding.weight"]
    assert torch.equal(table[:127].double(), state["pos_emb.emb.weight"][:127].float().double())
    assert (table[files.vocabulary.cls] == 0.5).all()
    assert not table[files.vocabulary.pad].any()
    network = files.build()
    assert "backbone.gene_embedding.weight" not in dict(network.named_parameters())


def test_gene_vectors_stay_as_they_are_in_training(shared: Path) -> None:
    """The zeros of a model without gene2vec, too: they are no vectors to be learned."""
    for name in ("base_g2v", "base_nog2v"):
        files, weights, _ = to_native(
            load_file(shared / f"golden/scbert/{name}/state_dict.safetensors"), vocabulary_of()
        )
        network: Any = files.build()
        load_weights(network, weights, name)
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
        network(pack_of(torch.randint(0, 6, (2, 128)), files.vocabulary)).tokens.square().sum().backward()
        optimizer.step()
        after = network.state_dict()
        assert torch.equal(after["backbone.gene_embedding.weight"], weights["backbone.gene_embedding.weight"])
        assert not torch.equal(after["backbone.value_embedding.weight"], weights["backbone.value_embedding.weight"])


def test_genes_go_by_their_names(shared: Path, tmp_path: Path) -> None:
    """A checkpoint whose genes stand in another order is the same model of the same genes."""
    state = load_file(shared / "golden/scbert/finetune_head/state_dict.safetensors")
    first, second = vocabulary_of(), vocabulary_of(NAMES[::-1])
    turned = [*range(126, -1, -1), 127]
    other = state | {
        "pos_emb.emb.weight": state["pos_emb.emb.weight"][turned],
        "to_out.fc1.weight": state["to_out.fc1.weight"][:, turned],
    }
    files, weights, _ = to_native(state, first)
    others, other_weights, _ = to_native(other, second)
    ids = load_file(shared / "golden/scbert/finetune_head/tensors.safetensors")["input_ids"]
    close(outputs(others, other_weights, ids[:, turned])["logits"], outputs(files, weights, ids)["logits"])


def test_names_may_come_as_a_vocab_json_and_learn_their_ensembl_ids(shared: Path, tmp_path: Path) -> None:
    state = load_file(shared / "golden/scbert/base_g2v/state_dict.safetensors")
    path, listed = write_checkpoint(tmp_path / "model.pth", state)
    vocabulary_of().save(tmp_path / "vocab.json")
    expected, weights, _ = read_scbert(path, vocabulary=listed)
    files, again, _ = read_scbert(tmp_path, vocabulary=tmp_path / "vocab.json", ensembl_of={"G003": "ENSG00000000003"})
    assert same(again, weights)
    assert files.vocabulary.entries[3].ensembl == "ENSG00000000003"
    assert [gene.id for gene in files.vocabulary.entries] == [gene.id for gene in expected.vocabulary.entries]


def test_bare_tensors_and_half_precision(shared: Path, tmp_path: Path, names: Path) -> None:
    state = load_file(shared / "golden/scbert/base_g2v/state_dict.safetensors")
    expected = to_native(state, vocabulary_of())[1]
    torch.save(state, tmp_path / "bare.pt")
    _, weights, report = read_scbert(tmp_path / "bare.pt", vocabulary=names)
    assert same(weights, expected)
    assert report.left_behind == []
    torch.save(state | {"norm.bias": state["norm.bias"].half()}, tmp_path / "half.pt")
    _, weights, report = read_scbert(tmp_path / "half.pt", vocabulary=names)
    assert torch.equal(weights["backbone.norm.bias"], state["norm.bias"].half().float())
    assert "1 tensors of torch.float16 became float32" in report.notes


def test_a_head_can_be_left_behind(shared: Path) -> None:
    state = load_file(shared / "golden/scbert/finetune_head/state_dict.safetensors")
    files, weights, report = to_native(state, vocabulary_of(), drop=["to_out.*"])
    assert files.heads == []
    assert not files.model.performer.tied
    assert len(report.left_behind) == 8
    load_weights(files.build(), weights, "headless")


def test_without_names_there_is_no_model(shared: Path) -> None:
    path = shared / "golden/scbert/checkpoint/tiny_pretrain_1.pth"
    with pytest.raises(ScfmError, match=r"tiny_pretrain_1\.pth: scBERT's files hold no gene names; give them with"):
        read_scbert(path)
