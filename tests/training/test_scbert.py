"""scBERT in training: its recipe, gene table, redraws, baselines, and runs that stop and go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from runs import write_shards
from scbert_runs import SCBERT, scbert_recipe

import scfm
from scfm.baselines.majority_bin import majority_bin_accuracies
from scfm.checkpoints.native import load_model, read_model, read_weights
from scfm.data.shards import open_shards
from scfm.errors import ScfmError
from scfm.metrics_file import read_metrics
from scfm.plan import plan_of
from scfm.recipe import Recipe
from scfm.recipe_reader import parse_recipe, read_recipe
from scfm.training.features import redraw_callbacks
from scfm.training.launch import build_trainer
from scfm.training.run import modules_of, pretrain, pretraining_job


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("cells") / "shards")


def losses(run: Path) -> list[tuple[int, str, float]]:
    """All that a run logged, but for speeds."""
    return sorted(row for row in read_metrics(run / "metrics.csv") if not row[1].startswith("speed/"))


def test_a_recipe_that_names_scbert_needs_few_keys(tmp_path: Path) -> None:
    for recipe in (
        read_recipe(None, {"model": {"name": "scbert"}}),
        parse_recipe(["--model.name", "scbert"], "scfm pretrain", "", lambda recipe: None)[0],
    ):
        model, data = recipe.model, recipe.data
        assert (model.width, model.heads, model.layers, model.hidden, model.attention) == (200, 10, 6, 800, "full")
        assert (data.values, data.n_bins, data.mask_value, data.cls_value, data.genes) == ("log2", 6, 6.0, 0.0, "all")
        assert (data.mask_candidates, data.mask_kept, data.mask_ratios) == ("expressed", 0.1, [0.15])
    mine = read_recipe(None, {"model": {"name": "scbert", "width": 64}, "data": {"mask_kept": 0.0}})
    assert (mine.model.width, mine.model.heads, mine.data.mask_kept) == (64, 10, 0.0)
    mine.save(tmp_path / "recipe.yaml")
    assert read_recipe(tmp_path / "recipe.yaml") == mine


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"mask_value": -1.0}}, r"data\.mask_value: -1; scBERT's hidden genes hold data\.n_bins, 13"),
        ({"data": {"cls_value": -2.0}}, r"data\.cls_value: -2; scBERT embeds bins, 0 to 12"),
        ({"data": {"values": "raw"}}, r"data\.values: scBERT embeds bins"),
        ({"data": {"mask_candidates": "all"}}, r"masked_bin predicts bins of expressed genes"),
        ({"data": {"mask_ratios": [0.0]}}, r"masked_bin predicts unknown genes, but data\.mask_ratios"),
        ({"objectives": [{"name": "gep"}]}, "gep needs a head of scGPT"),
        (
            {"trainer": {"compile": True}, "model": {"performer": {"kernel": "gelu"}}},
            r"trainer\.compile: the kernel gelu of model\.performer does not compile",
        ),
        ({"model": {"attention": "generative", "performer": {"head_width": 8}}}, r"(mask_kept|model\.attention)"),
    ],
)
def test_what_cannot_work_is_refused(shards: Path, tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ScfmError, match=message):
        pretrain(scbert_recipe(shards, tmp_path / "run", **sections))


def test_a_run_learns_and_shows_its_baselines(shards: Path, tmp_path: Path) -> None:
    """Loss falls over 60 steps; log, card and plot have the accuracy beside those of guessing."""
    recipe = scbert_recipe(shards, tmp_path / "run", trainer={"max_steps": 60, "log_every_n_steps": 20})
    folder = pretrain(recipe)
    rows = {(step, name): value for step, name, value in read_metrics(tmp_path / "run/metrics.csv")}
    assert rows[60, "train/masked_bin"] < 0.9 * rows[20, "train/masked_bin"]
    assert 0 < rows[60, "valid/masked_bin_accuracy"] < 1
    store = open_shards(shards)
    _, data = modules_of(pretraining_job(recipe, store))
    expected = majority_bin_accuracies(data, 13)
    assert {name: rows[0, name] for name in expected} == expected
    guess = f"guess the most frequent bin, accuracy | {rows[0, 'baseline_accuracy/most frequent bin']:.4g}"
    assert guess in (folder / "README.md").read_text()
    assert "The accuracy of masked bins" in (folder / "README.md").read_text()
    log = (tmp_path / "run/log.txt").read_text()
    assert "attention favor (correct, kernel exp, 2 heads of 8)" in log
    assert "baseline_accuracy/most frequent bin of the cell" in log
    assert (tmp_path / "run/plots/losses.png").stat().st_size > 5000


def test_the_model_embeds_and_neither_labels_nor_generates(shards: Path, tmp_path: Path) -> None:
    from cells import made_up_cells

    model = scfm.load(pretrain(scbert_recipe(shards, tmp_path / "run")))
    cells = made_up_cells(9, seed=3)
    together = model.embed(cells.copy()).obsm["X_scfm"]
    alone = np.concatenate([model.embed(cells[[row]].copy()).obsm["X_scfm"] for row in range(9)])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    with pytest.raises(ScfmError, match="has no `gep` head"):
        model.generate(cells, steps=1)
    with pytest.raises(ScfmError, match="has no head that predicts labels"):
        model.predict(cells)


def write_table(folder: Path, names: list[str], width: int = 16, dtype: str = "float64") -> Path:
    path = folder / "gene2vec.npy"
    np.save(path, np.random.default_rng(0).normal(size=(len(names), width)).astype(dtype))
    path.with_suffix(".txt").write_text("\n".join(names) + "\n")
    return path


def test_a_gene_table_is_aligned_by_name_and_travels_with_the_model(shards: Path, tmp_path: Path) -> None:
    vocabulary = open_shards(shards).vocabulary
    named = ["elsewhere", *vocabulary.names[: vocabulary.n_genes][::-1][:40]]
    path = write_table(tmp_path, named)
    vectors = np.load(path)
    folder = pretrain(scbert_recipe(shards, tmp_path / "run", model={"gene_table": str(path)}))
    assert "vectors of 40 of 60 genes; the other 20 have zeros" in (tmp_path / "run/log.txt").read_text()
    path.unlink()
    network, files = load_model(folder)
    weight = network.get_buffer("backbone.gene_embedding.weight")
    assert files.model.gene_table == str(path)
    for entry, name in enumerate(vocabulary.names):
        row = vectors[named.index(name)] if name in named else np.zeros(16)
        np.testing.assert_array_equal(weight[entry], row.astype(np.float32))
    assert f"{path.parent.name}/{path.name}" in files.card  # folders above are nobody's business


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.with_suffix(".txt").unlink(), r"names of its rows are needed in .*gene2vec\.txt"),
        (lambda path: path.with_suffix(".txt").write_text("G1\n"), r"has 3 rows, gene2vec\.txt 1 names"),
        (lambda path: path.with_suffix(".txt").write_text("A\nA\nB\n"), r"1 names stand in .* more than once: \['A'\]"),
        (lambda path: path.with_suffix(".txt").write_text("x\ny\nz\n"), "names no gene of the vocabulary"),
        (lambda path: np.save(path, np.zeros((3, 5))), r"have 5 numbers, but model\.width is 16"),
        (lambda path: np.save(path, np.zeros(3)), "must hold a matrix of numbers"),
        (lambda path: np.save(path, np.full((3, 16), np.nan)), "not finite"),
        (lambda path: path.write_text("no"), r"cannot be read as \.npy"),
    ],
)
def test_a_gene_table_that_does_not_fit_is_refused(shards: Path, tmp_path: Path, change: Any, message: str) -> None:
    path = write_table(tmp_path, open_shards(shards).vocabulary.names[:3])
    change(path)
    with pytest.raises(ScfmError, match=rf"model\.gene_table: .*{message}"):
        pretrain(scbert_recipe(shards, tmp_path / "run", model={"gene_table": str(path)}))


def test_two_rows_for_one_gene_are_refused(tmp_path: Path) -> None:
    from scfm.data.gene_vectors import read_gene_vectors
    from scfm.data.vocabulary import Gene, Vocabulary

    vocabulary = Vocabulary.from_genes([Gene.of("ENSG00000000001", "A"), Gene.of(None, "B")])
    vectors, found = read_gene_vectors(write_table(tmp_path, ["B", "ENSG00000000001.2"], 4), vocabulary, 4)
    assert found == 2
    np.testing.assert_array_equal(vectors[0], np.load(tmp_path / "gene2vec.npy")[0].astype(np.float32))
    path = write_table(tmp_path, ["ENSG00000000001.1", "B", "ENSG00000000001.2"], 4)
    with pytest.raises(ScfmError, match=r"1 genes have several rows .*\['A'\]"):
        read_gene_vectors(path, vocabulary, 4)


class Projections(L.Callback):
    """Keeps the features of the first layer that each step trains with, and that each validation reads."""

    def __init__(self) -> None:
        self.trained: list[torch.Tensor] = []
        self.validated: list[torch.Tensor] = []

    @staticmethod
    def now(module: Any) -> torch.Tensor:
        return module.network.backbone.blocks[0].mixer.projection.clone()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trained.append(self.now(pl_module))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.validated.append(self.now(pl_module))


def watched(recipe: Recipe) -> Projections:
    job = pretraining_job(recipe, open_shards(Path(str(recipe.data.shards))))
    module, data = modules_of(job)
    seen = Projections()
    options = {"logger": False, "enable_checkpointing": False}
    build_trainer(recipe, callbacks=[*redraw_callbacks(job.network, recipe.seed), seen], **options).fit(module, data)
    return seen


def test_features_are_drawn_every_so_many_optimizer_steps(shards: Path, tmp_path: Path) -> None:
    """Packs and validations do not count; the draws hang on the seed and their number alone."""
    trainer = {"max_steps": 8, "val_check_interval": 1, "check_val_every_n_epoch": None}
    seen = watched(scbert_recipe(shards, tmp_path / "a", trainer=trainer, data={"tokens_per_pack": 150}))
    kinds: list[int] = []
    for step, projection in enumerate(seen.trained):
        kinds.append(next(i for i, other in enumerate(seen.trained) if torch.equal(projection, other)))
        assert torch.equal(seen.validated[step], projection)
    assert kinds == [0, 0, 0, 3, 3, 3, 6, 6]
    other = watched(scbert_recipe(shards, tmp_path / "b", trainer={"max_steps": 5}, model={"layers": 1, "hidden": 24}))
    assert torch.equal(other.trained[4], seen.trained[4])
    assert not torch.equal(other.trained[0], seen.trained[4])
    seeded = watched(scbert_recipe(shards, tmp_path / "c", trainer={"max_steps": 5}, seed=1))
    assert not torch.equal(seeded.trained[4], seen.trained[4])


@pytest.mark.parametrize(
    "model",
    [
        {"mixer": "linear"},
        {"mixer": "softmax"},
        {"performer": SCBERT["model"]["performer"] | {"kernel": "none"}},
        {"performer": SCBERT["model"]["performer"] | {"redraw_every": 0}},
        {"performer": SCBERT["model"]["performer"] | {"mode": "compat"}},
    ],
    ids=str,
)
def test_nothing_is_drawn_where_nothing_is_due(shards: Path, tmp_path: Path, model: dict[str, Any]) -> None:
    job = pretraining_job(scbert_recipe(shards, tmp_path, model=model), open_shards(shards))
    assert redraw_callbacks(job.network, 0) == []


@pytest.mark.parametrize(
    ("form", "options"),
    [({}, {}), ({"mode": "compat"}, {}), ({}, {"mixer": "linear"}), ({"reversible": True}, {"mixer": "softmax"})],
    ids=["correct", "compat", "linear", "softmax"],
)
def test_a_resumed_run_equals_an_unbroken_one(
    shards: Path, tmp_path: Path, form: dict[str, Any], options: dict[str, Any]
) -> None:
    """Stopped between two draws, and at one."""
    recipe = scbert_recipe(
        shards,
        tmp_path / "run",
        model={"performer": SCBERT["model"]["performer"] | form, "dropout": 0.1} | options,
        trainer={"max_steps": 14, "log_every_n_steps": 1},
        checkpoint={"every_steps": 1, "keep": 20},
    )
    unbroken, logged = read_weights(pretrain(recipe)), losses(tmp_path / "run")
    for step in (11, 6, 5):
        weights = read_weights(pretrain(recipe, resume=str(tmp_path / f"run/checkpoints/step={step:09d}.ckpt")))
        assert weights.keys() == unbroken.keys()
        assert all(torch.equal(weights[name], unbroken[name]) for name in weights)
        assert losses(tmp_path / "run") == logged


def test_other_optimisers_precisions_and_recomputation_train_it(shards: Path, tmp_path: Path) -> None:
    plain = scbert_recipe(shards, tmp_path / "plain", trainer={"max_steps": 3})
    recomputed = scbert_recipe(shards, tmp_path / "re", trainer={"max_steps": 3, "gradient_checkpointing": True})
    ours, theirs = read_weights(pretrain(plain)), read_weights(pretrain(recomputed))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    muon = scbert_recipe(shards, tmp_path / "muon", optimizer={"name": "muon"}, model={"performer": {"glu": True}})
    bf16 = scbert_recipe(shards, tmp_path / "bf16", trainer={"precision": "bf16-mixed"})
    for recipe in (muon, bf16):
        rows = read_metrics(Path(pretrain(recipe)).parent / "metrics.csv")
        assert all(np.isfinite(value) for _, _, value in rows)


def test_plans_refuse_it(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ScfmError, match=r"model\.name: scbert is not planned yet"):
        plan_of(scbert_recipe(shards, tmp_path))


def test_the_model_directory_says_what_it_is(shards: Path, tmp_path: Path) -> None:
    files = read_model(pretrain(scbert_recipe(shards, tmp_path / "run")))
    assert files.model.name == "scbert"
    assert files.tokens.values == "log2"
    assert [(head.task, head.kind, head.n_out) for head in files.heads] == [("masked_bin", "bins", 14)]
    assert "log2(1 + expression per 10,000) rounded down, at most 12, embedding of bins" in files.card
    assert "| mixer | favor, correct, kernel exp, heads of width 8 |" in files.card
