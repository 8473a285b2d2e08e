"""The model against stored outputs of scBERT: the same weights and inputs, the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scbert_cases import N_BINS, Case, close, close_gradient, our_tensors, pack
from torch import Tensor

from scfm.model.heads import HeadSpec
from scfm.model.mixer_block import MixerBlock
from scfm.model.output import ModelOutput
from scfm.model.performer import Segments
from scfm.objectives import CLS, MaskedBin

pytestmark = pytest.mark.golden


def branches(case: Case, ids: Tensor, key_mask: Tensor | None = None) -> dict[str, Tensor]:
    """Return what they traced: each branch before its residual, the tokens before the last norm, logits, encodings."""
    model, batch = case.model, pack(ids)
    found: dict[str, Tensor] = {}
    x, segments = model.backbone.embed(batch), Segments.of(batch)
    for index, block in enumerate(model.backbone.blocks):
        assert isinstance(block, MixerBlock)
        found[f"trace.attn_out.{index}"] = block.attend(x, segments, key_mask)
        x = x + found[f"trace.attn_out.{index}"]
        found[f"trace.ff_out.{index}"] = block.feed_forward(x)
        x = x + found[f"trace.ff_out.{index}"]
    tokens, _ = model.backbone(batch, key_mask)
    return found | {
        "trace.performer_out": x,
        "encodings": tokens,
        "logits": model.read_bins("masked_bin", tokens),
    }


@pytest.mark.parametrize(
    "name",
    [
        "base_nog2v",
        "base_g2v",
        "default_dimhead64",
        "generalized_relu",
        "generalized_gelu",
        "no_projection",
        "scalenorm",
        "rezero",
        "glu",
        "tied_qkvbias_chunk",
    ],
)
@torch.no_grad()
def test_every_form(shared: Path, name: str) -> None:
    case = Case(shared / "golden/scbert" / name)
    found = branches(case, case.tensors["input_ids"])
    stored = {key: tensor for key, tensor in case.tensors.items() if key not in ("input_ids", "gene2vec_npy")}
    for key, tensor in stored.items():
        close(found[key], tensor)
    assert len(stored) == 3 + 2 * len(case.model.backbone.blocks)


@torch.no_grad()
def test_reversible_streams(shared: Path) -> None:
    case = Case(shared / "golden/scbert/reversible")
    batch = pack(case.tensors["input_ids"])
    backbone = case.model.backbone
    before_norm: list[Tensor] = []
    backbone.norm.register_forward_pre_hook(lambda _, given: before_norm.append(given[0]))
    tokens, _ = backbone(batch)
    close(before_norm[0], case.tensors["trace.performer_out"])
    close(tokens, case.tensors["encodings"])
    close(case.model.read_bins("masked_bin", tokens), case.tensors["logits"])


@torch.no_grad()
def test_padding_as_scbert_treats_it(shared: Path) -> None:
    """Padded tokens are read like all others, or with a mask have their values zeroed; alone, nothing is padded."""
    case = Case(shared / "golden/scbert/padded")
    ids, mask = case.tensors["input_ids"], case.tensors["mask"]
    for prefix, key_mask in (("nomask.", None), ("mask.", mask.flatten())):
        found = branches(case, ids, key_mask)
        stored = {key: tensor for key, tensor in case.tensors.items() if key.startswith(prefix)}
        assert len(stored) == 7
        for key, tensor in stored.items():
            close(found[key.removeprefix(prefix)], tensor)
    changed, _ = case.model.backbone(pack(case.tensors["probe.input_ids_padding_changed"]), mask.flatten())
    close(changed, case.tensors["probe.mask.encodings_padding_changed"])
    length = case.meta["lengths"][2]
    close(case.model.backbone(pack(ids[2:, :length]))[0], case.tensors["probe.unpadded_row2.encodings"])


@torch.no_grad()
def test_batch_mates_matter(shared: Path) -> None:
    case = Case(shared / "golden/scbert/batch_dependence")
    ids = case.tensors["input_ids"]
    together, _ = case.model.backbone(pack(ids))
    close(together, case.tensors["encodings_batch4"])
    alone = torch.cat([case.model.backbone(pack(cell[None]))[0] for cell in ids])
    close(alone, case.tensors["encodings_one_by_one"])
    assert float((together - alone).abs().max()) == pytest.approx(case.meta["facts"]["max_abs_diff"], abs=1e-4)


def attention_map(block: MixerBlock, x: Tensor, segments: Segments) -> Tensor:
    """Return who reads whom, (H, queries, keys): the mixer's output where values are rows of the identity."""
    q, k, v = block.queries(x).unbind(1)
    n, width = len(x), v.shape[-1]
    parts = []
    for rows in torch.eye(n).split(width, dim=1):
        values = torch.nn.functional.pad(rows, (0, width - rows.shape[1]))[:, None].expand_as(v)
        parts.append(block.mixer(torch.stack([q, k, values], 1), segments)[..., : rows.shape[1]])
    return torch.cat(parts, -1).transpose(0, 1)


@torch.no_grad()
def test_attention_maps(shared: Path) -> None:
    """True maps by layer and head; scBERT's own, of the tokens after the attention's residual, in fp16; scores."""
    case = Case(shared / "golden/scbert/attention_maps")
    batch = pack(case.tensors["input_ids"])
    backbone, segments = case.model.backbone, Segments.of(batch)
    x, theirs = backbone.embed(batch), []
    for block, truth in zip(backbone.blocks, case.tensors["true_maps_fp32"], strict=True):
        assert isinstance(block, MixerBlock)
        found = attention_map(block, x, segments)
        close(found, truth)
        scores = block.mixer.gene_scores(block.queries(x), segments)
        torch.testing.assert_close(scores, truth[0].mean((0, 1)), atol=1e-6, rtol=1e-4)
        x = x + block.attend(x, segments)
        theirs.append(attention_map(block, x, segments).abs().mean(0))
        x = x + block.feed_forward(x)
    reference = case.tensors["attn_map_reference_fp16"][0, 0].float()
    assert float((torch.stack(theirs).mean(0) - reference).abs().max()) < 2e-3
    close(backbone.norm(x), case.tensors["encodings"])


@pytest.mark.parametrize("name", ["mlm_loss_grad", "mlm_loss_grad_reversible"])
def test_loss_and_every_gradient_of_masked_bins(shared: Path, name: str) -> None:
    case = Case(shared / "golden/scbert" / name)
    case.model.train()
    stored = case.tensors
    batch = pack(stored["masked_input"], stored["labels"])
    output = case.model(batch)
    loss, metrics = MaskedBin(N_BINS).loss(batch, output)
    assert float(loss.detach()) == pytest.approx(float(stored["loss"]), abs=1e-6)
    close(case.model.read_bins("masked_bin", output.tokens), stored["logits"])
    hidden = stored["labels"].flatten()[batch.predicted]
    right = (stored["pred_1to5"].flatten()[batch.predicted] == hidden).float().mean()
    assert float(metrics["masked_bin_accuracy"]) == pytest.approx(float(right))
    loss.backward()
    gradients = our_tensors({key[5:]: tensor for key, tensor in stored.items() if key.startswith("grad.")})
    assert gradients.keys() == dict(case.model.named_parameters()).keys()
    for key, parameter in case.model.named_parameters():
        close_gradient(parameter.grad, gradients[key], key)


def test_recomputed_blocks_have_the_same_gradients(shared: Path) -> None:
    for name in ("mlm_loss_grad", "mlm_loss_grad_reversible"):
        case = Case(shared / "golden/scbert" / name)
        case.model.train()
        case.model.backbone.recompute = True
        batch = pack(case.tensors["masked_input"], case.tensors["labels"])
        MaskedBin(N_BINS).loss(batch, case.model(batch))[0].backward()
        gradients = our_tensors({key[5:]: grad for key, grad in case.tensors.items() if key.startswith("grad.")})
        for key, parameter in case.model.named_parameters():
            close_gradient(parameter.grad, gradients[key], key)


@torch.no_grad()
def test_redraw_counts_forward_passes(shared: Path) -> None:
    """Their features were drawn by their generator: ours take their place before a forward that drew new ones."""
    case = Case(shared / "golden/scbert/redraw")
    backbone = case.model.backbone
    batch = pack(case.tensors["input_ids"])
    case.model.train()
    counters, drawn_at = [], []
    for forward in range(6):
        before = [mixer.projection.clone() for mixer in backbone.random_features()]
        case.model(batch)
        counters.append(int(backbone.since_redraw))
        changed = {
            bool((now.projection != then).any()) for now, then in zip(backbone.random_features(), before, strict=True)
        }
        assert len(changed) == 1  # all layers or none
        if changed == {True}:
            drawn_at.append(forward)
        for layer, mixer in enumerate(backbone.random_features()):
            mixer.projection.copy_(case.tensors[f"projection{layer}.{forward}"])
        case.model.eval()
        tokens, _ = backbone(batch)
        close(case.model.read_bins("masked_bin", tokens), case.tensors[f"logits.{forward}"])
        case.model.train()
    assert counters == case.meta["counter_after_forward"]
    assert drawn_at == case.meta["redrawn_at_forward"]


def test_finetuning_head(shared: Path) -> None:
    """Logits, loss and gradients; what trains there are the last norm, the last block but one, and the head."""
    folder = shared / "golden/scbert/finetune_head"
    labels = [str(label) for label in range(5)]
    case = Case(folder, [HeadSpec("annotation", "genes", 5, labels)])
    stored = case.tensors
    trains = ("backbone.norm.", "backbone.blocks.1.", "heads.")
    for key, parameter in case.model.named_parameters():
        parameter.requires_grad = key.startswith(trains)
    batch = pack(stored["input_ids"])
    batch.cell_conditions["label"] = stored["labels"]
    output: ModelOutput = case.model(batch)
    close(output.tokens, stored["encodings"])
    close(output.predictions["annotation"], stored["logits"])
    loss, _ = CLS(labels).loss(batch, output)
    assert float(loss.detach()) == pytest.approx(float(stored["loss"]), abs=1e-6)
    loss.backward()
    gradients = our_tensors({key[5:]: tensor for key, tensor in stored.items() if key.startswith("grad.")})
    trained = {key for key, parameter in case.model.named_parameters() if parameter.requires_grad}
    assert gradients.keys() == trained
    for key in sorted(trained):
        close_gradient(case.model.get_parameter(key).grad, gradients[key], key)
