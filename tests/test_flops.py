"""FLOPs against torch's own counter, against numbers by hand, and against the ways in which they get inflated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from packs import N_BINS, N_GENES, PAD, bin_pack, random_pack
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scfm.flops import DEVICES, Work, backbone_flops, forward_flops, training_flops
from scfm.model import ScBERT, ScGPT
from scfm.model.heads import HeadSpec
from scfm.objectives import build_objectives
from scfm.recipe import ModelConfig, ObjectiveConfig, PerformerConfig

WIDTH, HIDDEN, LAYERS = 16, 24, 2
LENGTHS, KNOWN = [9, 6, 1], [4, 6, 1]
TOKENS, UNKNOWN, CELLS = 16, 5, 3
HEADS = [HeadSpec("gep", "gep"), HeadSpec("gepc", "gepc"), HeadSpec("annotation", "cls", 4, list("abcd"))]


def model(heads: list[HeadSpec] | None = None, **options: Any) -> ScGPT:
    shape = {"width": WIDTH, "heads": 4, "layers": LAYERS, "hidden": HIDDEN, "dropout": 0.0, "backend": "dense"}
    config = ModelConfig(**{**shape, "value_encoder": "scaling", **options})
    # in float64 all linear layers are torch's own, which its counter knows; in float32 they are oneDNN's
    return ScGPT(config, N_GENES + 2, PAD, N_BINS, {}, {}, HEADS if heads is None else heads).double()


def counted(network: nn.Module, pack: Any) -> dict[str, int]:
    """Return what torch's counter finds in a forward pass, as FLOPs of matrix products and of attention."""
    # the counter does not know the CPU's flash kernel
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network(pack)
    by_kind = counter.get_flop_counts()["Global"]
    attention = sum(flops for op, flops in by_kind.items() if "attention" in str(op) or "bmm" in str(op))
    return {"attention": attention, "linear": sum(by_kind.values()) - attention}


def linear_part(network: nn.Module, work: Work, **options: Any) -> float:
    return forward_flops(network, replace(work, pairs=0), **options)


@pytest.mark.parametrize(
    "heads",
    [
        [],
        HEADS,
        [HeadSpec("gep", "gep", nonzero=True), HeadSpec("gepc", "gepc", nonzero=True)],
        [HeadSpec("gep", "gep", N_BINS), HeadSpec("gepc", "gepc", N_BINS)],
        [HeadSpec("gep", "gep", affine=True), HeadSpec("gepc", "gepc", query="concat")],
        [HeadSpec("gepc", "gepc", query="sum"), HeadSpec("dar", "domain", 3, list("abc"), layers=2)],
    ],
    ids=["backbone", "usual", "nonzero", "bins", "affine and concat", "sum and domain"],
)
@pytest.mark.parametrize("attention", ["generative", "full"])
def test_linear_layers_count_as_in_torch(heads: list[HeadSpec], attention: Any) -> None:
    network, pack = model(heads, attention=attention), random_pack(LENGTHS, KNOWN)
    assert linear_part(network, Work.of(pack, attention)) == counted(network, pack)["linear"]


def scbert(heads: list[HeadSpec], mixer: str, **form: Any) -> ScBERT:
    performer = PerformerConfig(head_width=8, features=24, **form)
    shape: dict[str, Any] = {"width": WIDTH, "heads": 4, "layers": LAYERS, "hidden": HIDDEN, "dropout": 0.0}
    config = ModelConfig(name="scbert", **shape, attention="full", mixer=mixer, performer=performer)
    return ScBERT(config, N_GENES + 2, PAD, N_BINS, {}, {}, heads).double()


@pytest.mark.parametrize(
    ("mixer", "form"),
    [
        ("favor", {}),
        ("favor", {"kernel": "relu", "glu": True}),
        ("favor", {"tied": True}),
        ("linear", {"reversible": True}),
        ("softmax", {}),
    ],
    ids=str,
)
def test_scbert_counts_as_in_torch(mixer: str, form: dict[str, Any]) -> None:
    """Backbone, masked bins and the classes that are read from all genes; cells of one length, for softmax is dense."""
    heads = [HeadSpec("masked_bin", "bins", N_BINS + 1), HeadSpec("annotation", "genes", 4, list("abcd"))]
    network, pack = scbert(heads, mixer, **form), bin_pack([9, 9, 9], [4, 6, 1])
    work = Work.of(pack, "full")
    assert forward_flops(network, work) == sum(counted(network, pack).values())


def test_a_cell_of_scbert_by_hand() -> None:
    """16,907 genes of the published model: 8 m d per head in FAVOR+, a tenth of what exact attention would take."""
    config = ModelConfig("scbert", 200, 10, 6, 800, 0.0, attention="full")
    with torch.device("meta"):
        network, exact = (
            ScBERT(replace(config, mixer=mixer), 16908, 16906, 6, {}, {}, []) for mixer in ("favor", "softmax")
        )
    work = Work.of_cell(16907, 16907 - 135, "full")
    linear = 6 * 16907 * 2 * (3 * 200 * 640 + 640 * 200 + 2 * 200 * 800)
    assert backbone_flops(network.backbone, work) == linear + 6 * 16907 * 8 * 640 * 266
    assert backbone_flops(exact.backbone, work) == linear + 6 * 4 * 640 * 16907**2


def test_value_encoders_do_not_count() -> None:
    """Bins are encoded once per pack, not once per token: 11 of them here, and two special values."""
    pack = random_pack(LENGTHS, KNOWN)
    network = model(value_encoder="continuous")
    ours = linear_part(network, Work.of(pack, "generative"))
    assert ours == linear_part(model(), Work.of(pack, "generative"))
    pack.levels = torch.arange(-2, N_BINS).float()
    assert counted(network, pack)["linear"] - ours == len(pack.levels) * 2 * (WIDTH + WIDTH * WIDTH)


def test_backward_takes_twice_its_forward_as_in_torch() -> None:
    network, pack = model(), random_pack(LENGTHS, KNOWN)
    objectives = build_objectives([ObjectiveConfig("gep"), ObjectiveConfig("cls")], N_BINS, labels=list("abcd"))
    network = model([head for objective in objectives for head in objective.heads()])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = network(pack)
        (output.predictions["gep"].sum() + output.predictions["annotation"].sum()).backward()
    by_kind = counter.get_flop_counts()["Global"]
    linear = sum(flops for op, flops in by_kind.items() if "attention" not in str(op) and "bmm" not in str(op))
    work = replace(Work.of(pack, "generative"), pairs=0)
    assert training_flops(network, objectives, work, 0) == linear


def test_attention_of_cells_of_one_length_counts_as_in_torch() -> None:
    """The dense backend computes all M x M pairs of the longest cell: what full attention needs where M is the same."""
    network, pack = model(attention="full"), random_pack([7, 7, 7], [3, 3, 3])
    work = Work.of(pack, "full")
    assert work.pairs == 3 * 49
    attention = backbone_flops(network.backbone, replace(work, tokens=0))
    assert attention == 2 * 2 * WIDTH * LAYERS * 3 * 49
    assert attention == counted(network, pack)["attention"]


def test_work_by_hand() -> None:
    pack = random_pack(LENGTHS, KNOWN)
    assert Work.of(pack, "generative") == Work(TOKENS, CELLS, UNKNOWN, (9 * 4 + 5) + 6 * 6 + 1)
    assert Work.of(pack, "full") == Work(TOKENS, CELLS, UNKNOWN, 81 + 36 + 1)
    each = [Work.of_cell(m, k, "generative") for m, k in zip(LENGTHS, KNOWN, strict=True)]
    assert sum(each, Work()) == Work.of(pack, "generative")


def test_a_cell_by_hand() -> None:
    network, work = model(), Work.of_cell(9, 4, "generative")
    square = WIDTH * WIDTH
    blocks = LAYERS * (9 * 2 * (4 * square + 2 * WIDTH * HIDDEN) + 4 * WIDTH * (9 * 4 + 5))
    gep = 5 * 2 * (2 * square + WIDTH)
    gepc = 5 * 2 * square + 2 * square
    annotation = 2 * (2 * square + 4 * WIDTH)
    assert backbone_flops(network.backbone, work) == blocks
    assert forward_flops(network, work) == blocks + gep + gepc + annotation
    assert forward_flops(network, work, ["gep"]) == blocks + gep


def test_pseudo_cells_do_not_count() -> None:
    pack, filled = random_pack(LENGTHS, KNOWN), random_pack([*LENGTHS, 20], [*KNOWN, 1])
    filled.cell_id[-1] = -1
    for attention in ("generative", "full"):
        assert Work.of(filled, attention) == Work.of(pack, attention)  # type: ignore[arg-type]
    assert Work.of(replace(pack, cell_id=torch.full((3,), -1)), "full") == Work()


def test_neither_the_vocabulary_nor_conditions_cost_anything() -> None:
    work = Work.of_cell(9, 4, "generative")
    config = ModelConfig(width=WIDTH, heads=4, layers=LAYERS, hidden=HIDDEN)
    small, large = (ScGPT(config, n, PAD, N_BINS, {}, {}, HEADS) for n in (N_GENES + 2, 5000))
    assert forward_flops(small, work) == forward_flops(large, work)


def test_the_published_geometry() -> None:
    """51 M parameters, 1,201 tokens of which 601 are known: 193 GFLOP a cell and pass, two passes 385."""
    with torch.device("meta"):
        network = ScGPT(ModelConfig(), 60_697, 0, 51, {}, {}, [HeadSpec("gep", "gep"), HeadSpec("gepc", "gepc")])
    configs = [ObjectiveConfig("gep"), ObjectiveConfig("gepc"), ObjectiveConfig("cell_prompt", start_step=1000)]
    objectives, cell = build_objectives(configs, 51), Work.of_cell(1201, 601, "generative")
    assert training_flops(network, objectives, cell, 0) == pytest.approx(193e9, rel=0.01)
    assert training_flops(network, objectives, cell, 1000) == pytest.approx(385e9, rel=0.01)


def test_passes_of_every_objective() -> None:
    network, work = model(), Work.of_cell(9, 4, "generative")
    body = backbone_flops(network.backbone, work)
    gep, gepc, annotation = (forward_flops(network, work, [task]) - body for task in ("gep", "gepc", "annotation"))

    def of(*names: str, step: int = 9, **options: Any) -> float:
        configs = [ObjectiveConfig(name, start_step=5 if name != "gep" else 0, **options) for name in names]
        return training_flops(network, build_objectives(configs, N_BINS, labels=list("abcd")), work, step)

    assert of("gep") == 3 * (body + gep)
    assert of("gep", "gepc", "cls") == 3 * (body + gep + gepc + annotation)
    assert of("gep", "gepc", "cls", step=4) == 3 * (body + gep)  # a head that no active objective reads
    assert of("gep", "cell_prompt") == 6 * (body + gep)
    assert of("gep", "cell_prompt", step=4) == 3 * (body + gep)
    assert of("gep", "ecs") == 3 * (body + gep) + body
    assert of("gep", "cce") == 3 * (body + gep) + 2 * body + 3 * body
    assert of("gep", "ecs", "cce") == of("gep", "cce")


def test_devices_are_dense_figures() -> None:
    assert DEVICES["h200"].ceiling == 790e12
    assert DEVICES["a100"].ceiling == DEVICES["a100"].flops == 312e12
    sparse = {"h100": 1979e12, "h200": 1979e12, "a100": 624e12, "l40s": 733e12, "rtx4090": 330.3e12}
    assert all(DEVICES[name].flops < 0.51 * figure for name, figure in sparse.items())
