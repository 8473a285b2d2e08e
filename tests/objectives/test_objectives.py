"""Losses against their formulas, as shares of a global batch that add up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from packs import N_BINS, random_pack

from scfm.data.batch import PackedBatch
from scfm.errors import ScfmError
from scfm.model.heads import HeadSpec
from scfm.model.output import ModelOutput
from scfm.objectives import CCE, CLS, DAR, ECS, GEP, GEPC, OBJECTIVES, CellPrompt, MaskedBin, build_objectives
from scfm.recipe import ObjectiveConfig


def output_of(batch: PackedBatch, **predictions: torch.Tensor) -> ModelOutput:
    return ModelOutput(torch.empty(batch.n_tokens, 4), torch.empty(batch.n_cells, 4), predictions)


def test_squared_error_is_the_mean_over_unknown_genes() -> None:
    batch = random_pack([6, 4], [2, 3])
    truth = batch.targets[batch.predicted]
    prediction = torch.randn(5)
    for objective in (GEP(N_BINS), GEPC(N_BINS), CellPrompt(N_BINS)):
        loss, metrics = objective.loss(batch, output_of(batch, **{objective.name: prediction}))
        torch.testing.assert_close(loss, F.mse_loss(prediction, truth))
        assert metrics == {}


def test_cross_entropy_over_bins_also_reports_the_error_of_the_expected_bin() -> None:
    batch = random_pack([6, 4], [2, 3])
    truth = batch.targets[batch.predicted]
    logits = torch.randn(5, N_BINS)
    loss, metrics = GEP(N_BINS, "cross_entropy").loss(batch, output_of(batch, gep=logits))
    torch.testing.assert_close(loss, F.cross_entropy(logits, truth.long()))
    expected = (logits.softmax(-1) * torch.arange(N_BINS)).sum(-1)
    torch.testing.assert_close(metrics["gep_mse"], F.mse_loss(expected, truth))


def test_nonzero_adds_the_surprise_of_being_expressed() -> None:
    batch = random_pack([6, 4], [2, 3])
    batch.targets[batch.predicted[::2]] = 0
    truth = batch.targets[batch.predicted]
    values, logits = torch.randn(5), torch.randn(5)
    output = output_of(batch, gep=values, gep_nonzero=logits)
    loss, metrics = GEP(N_BINS, nonzero=True).loss(batch, output)
    surprise = -torch.where(truth > 0, logits.sigmoid(), 1 - logits.sigmoid()).log().mean()
    torch.testing.assert_close(metrics["gep_nonzero"], surprise)
    torch.testing.assert_close(loss, F.mse_loss(values, truth) + surprise)


def test_domains_are_scored_like_classes() -> None:
    batch = random_pack([3, 3, 3], [2, 2, 2])
    batch.cell_conditions = {"donor": torch.tensor([1, -1, 0])}
    batch = replace(batch, total_cells=2)
    logits = torch.tensor([[0.0, 2.0], [9.0, 9.0], [-1.0, 1.0]])
    loss, metrics = DAR("donor", ["x", "y"]).loss(batch, output_of(batch, dar=logits))
    torch.testing.assert_close(loss, F.cross_entropy(logits[[0, 2]], torch.tensor([1, 0])))
    assert metrics["dar_accuracy"] == 0.5


def test_contrastive_loss_finds_each_cell_among_all() -> None:
    cells, again = torch.randn(4, 3), torch.randn(4, 3)
    expected = 0.0
    for i in range(4):
        scores = torch.stack([F.cosine_similarity(cells[i], again[j], dim=0) for j in range(4)]) / 0.5
        expected = expected - scores.log_softmax(0)[i] / 4
    torch.testing.assert_close(CCE().loss(cells, again), expected)


def test_shares_of_packs_add_up_to_the_global_mean() -> None:
    """Packs of very different size, one without any unknown gene."""
    whole = random_pack([9, 2, 5], [3, 1, 5])
    label = torch.tensor([0, 2, 1])
    whole.cell_conditions = {"label": label}
    values, logits = torch.randn(7), torch.randn(3, 3)
    gep, cls = GEP(N_BINS), CLS(["a", "b", "c"])
    expected = gep.loss(whole, output_of(whole, gep=values))
    expected_cls = cls.loss(whole, output_of(whole, annotation=logits))
    total, total_cls = 0.0, 0.0
    for cell, predicted in enumerate((slice(0, 6), slice(6, 7), slice(7, 7))):
        start, stop = whole.cu_seqlens[cell : cell + 2].tolist()
        part = replace(
            whole,
            genes=whole.genes[start:stop],
            values=whole.values[start:stop],
            targets=whole.targets[start:stop],
            cu_seqlens=torch.tensor([0, stop - start], dtype=torch.int32),
            n_known=whole.n_known[cell : cell + 1],
            cell_id=whole.cell_id[cell : cell + 1],
            cell_conditions={"label": label[cell : cell + 1]},
        )
        total += gep.loss(part, output_of(part, gep=values[predicted]))[0]
        total_cls += cls.loss(part, output_of(part, annotation=logits[cell : cell + 1]))[0]
    torch.testing.assert_close(total, expected[0])
    torch.testing.assert_close(total_cls, expected_cls[0])


def test_a_pack_without_real_cells_gives_a_zero_loss_with_a_graph() -> None:
    """DDP needs a gradient for every parameter on every rank, also where a rank has nothing to learn from."""
    batch = random_pack([3], [1])
    batch = replace(batch, cell_id=torch.tensor([-1]), cell_conditions={"label": torch.tensor([0])})
    assert len(batch.predicted) == 0
    for objective, shape in (
        (GEP(N_BINS), (0,)),
        (GEP(N_BINS, "cross_entropy"), (0, N_BINS)),
        (CLS(["a", "b"]), (1, 2)),
        (CLS(["a", "b"], torch.tensor([1.0, 2.0])), (1, 2)),
    ):
        prediction = torch.zeros(shape, requires_grad=True)
        loss, _ = objective.loss(batch, output_of(batch, **{objective.head: prediction}))
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, prediction)[0].any()


def test_classes_ignore_unlabelled_and_pseudo_cells() -> None:
    batch = random_pack([2, 2, 2, 2], [2, 2, 2, 2])
    batch.cell_id[3] = -1
    batch.cell_conditions = {"label": torch.tensor([1, -1, 0, 0])}
    batch.total_cells = 3
    logits = torch.tensor([[0.0, 3.0], [5.0, 0.0], [1.0, 2.0], [9.0, 0.0]])
    loss, metrics = CLS(["a", "b"]).loss(batch, output_of(batch, annotation=logits))
    expected = F.cross_entropy(logits[[0, 2]], torch.tensor([1, 0]), reduction="sum") / 3
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["cls_accuracy"], torch.tensor(1 / 3))


def test_class_weights_keep_a_cells_gradient_independent_of_its_batch_mates() -> None:
    batch = random_pack([2, 2], [2, 2])
    batch.cell_conditions = {"label": torch.tensor([0, 1])}
    logits, weights = torch.randn(2, 2), torch.tensor([0.5, 3.0])
    loss, _ = CLS(["a", "b"], weights).loss(batch, output_of(batch, annotation=logits))
    each = F.cross_entropy(logits, torch.tensor([0, 1]), reduction="none")
    torch.testing.assert_close(loss, (weights * each).sum() / 2)


def test_elastic_similarity_by_hand() -> None:
    """Three cells: two alike, one opposite; negative similarity and the diagonal count as 0."""
    cells = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])
    t = 0.8
    expected = (2 * (1 - (1 - t) ** 2) + 7 * (1 - t**2)) / 9
    torch.testing.assert_close(ECS(t).loss(cells), torch.tensor(expected))


def test_masked_bins_are_a_cross_entropy_over_all_logits_and_an_accuracy_among_expressed_bins() -> None:
    batch = random_pack([6, 4], [2, 3])
    truth = batch.targets[batch.predicted].long()
    logits = torch.randn(5, N_BINS + 1)
    logits[:, [0, N_BINS]] += 20  # not expressed, and the mask: never right
    logits[0, truth[0]] += 10
    loss, metrics = MaskedBin(N_BINS).loss(batch, output_of(batch, masked_bin=logits))
    torch.testing.assert_close(loss, F.cross_entropy(logits, truth))
    best = logits[:, 1:N_BINS].argmax(-1) + 1
    assert best[0] == truth[0]
    assert float(metrics["masked_bin_accuracy"]) == pytest.approx(float((best == truth).float().mean()))


def test_masked_bins_need_hidden_genes() -> None:
    batch = random_pack([6], [6])
    batch.targets = None
    with pytest.raises(ScfmError, match=r"has no targets; set data\.mask_ratios"):
        MaskedBin(N_BINS).loss(batch, output_of(batch, masked_bin=torch.empty(0, N_BINS + 1)))


def test_recipe_builds_objectives_with_their_heads() -> None:
    configs = [
        ObjectiveConfig("gep", weight=2.0),
        ObjectiveConfig("gepc", loss="cross_entropy"),
        ObjectiveConfig("cell_prompt", start_step=7),
        ObjectiveConfig("ecs", threshold=0.3),
        ObjectiveConfig("cls"),
        ObjectiveConfig("dar", condition="donor"),
        ObjectiveConfig("cce", temperature=0.1),
        ObjectiveConfig("masked_bin"),
    ]
    objectives = build_objectives(configs, n_bins=N_BINS, labels=["a", "b"], categories={"donor": ["x", "y", "z"]})
    assert [objective.name for objective in objectives] == [config.name for config in configs] == list(OBJECTIVES)
    assert [objective.name for objective in objectives if objective.scope == "global"] == ["ecs", "cce"]
    assert [objective.name for objective in objectives if objective.needs_second_pass] == ["cell_prompt"]
    assert objectives[0].weight == 2.0
    assert objectives[2].start_step == 7
    heads = {head.task: head for objective in objectives for head in objective.heads()}
    assert heads == {
        "gep": HeadSpec("gep", "gep"),
        "gepc": HeadSpec("gepc", "gepc", N_BINS),
        "annotation": HeadSpec("annotation", "cls", 2, ["a", "b"]),
        "dar": HeadSpec("dar", "domain", 3, ["x", "y", "z"]),
        "masked_bin": HeadSpec("masked_bin", "bins", N_BINS + 1),
    }
    (by_gene,) = build_objectives([ObjectiveConfig("cls", head="genes")], n_bins=N_BINS, labels=["a", "b"])
    assert by_gene.heads() == [HeadSpec("annotation", "genes", 2, ["a", "b"])]
    (gep,) = build_objectives([ObjectiveConfig("gep", nonzero=True)], n_bins=N_BINS)
    assert gep.heads() == [HeadSpec("gep", "gep", nonzero=True)]


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([ObjectiveConfig("gpe")], r"no 'gpe'; choose from gep, gepc, cell_prompt, ecs, cls"),
        ([ObjectiveConfig("dar")], r"dar needs `condition`"),
        ([ObjectiveConfig("dar", condition="donor")], r"at least 2 values; the obs column 'donor' has 0"),
        ([ObjectiveConfig("cls")], r"cls needs a task with at least 2 labels, there are 0"),
        (
            [ObjectiveConfig("gep"), ObjectiveConfig("cell_prompt", loss="cross_entropy")],
            r"cell_prompt shares the head gep, so it needs the same `loss`",
        ),
    ],
)
def test_recipes_that_cannot_work(configs: list[ObjectiveConfig], message: str) -> None:
    with pytest.raises(ScfmError, match=message):
        build_objectives(configs, n_bins=N_BINS)


def test_missing_inputs_are_named() -> None:
    batch = random_pack([3], [2])
    with pytest.raises(ScfmError, match="gep: the batch has no targets"):
        GEP(N_BINS).loss(replace(batch, targets=None), output_of(batch, gep=torch.zeros(1)))
    with pytest.raises(ScfmError, match="no cell condition `label`"):
        CLS(["a", "b"]).loss(batch, output_of(batch, annotation=torch.zeros(1, 2)))
