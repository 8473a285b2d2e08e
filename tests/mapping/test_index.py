"""A reference index: built, saved, extended and queried; whatever fails leaves the former index whole."""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import numpy as np
import pytest
from anndata import AnnData
from cells import made_up_cells
from untrained import WIDTH, untrained_model

import scfm
from scfm.baselines import KNNOnPCA
from scfm.errors import ScfmError
from scfm.mapping import ReferenceIndex
from scfm.mapping import index as index_module
from scfm.mapping import parts as parts_module
from scfm.model.heads import HeadSpec
from scfm.tasks.mapping import ReferenceMapping


@pytest.fixture(scope="module")
def model() -> scfm.PretrainedModel:
    return untrained_model()


@pytest.fixture(scope="module")
def another() -> scfm.PretrainedModel:
    """The same form with other weights."""
    return untrained_model(seed=1)


@pytest.fixture
def built(model: scfm.PretrainedModel) -> ReferenceIndex:
    return ReferenceIndex.build(model, made_up_cells(90, seed=1), ["cell_type"])


def test_queries_get_the_labels_of_their_type(model: scfm.PretrainedModel, built: ReferenceIndex) -> None:
    query = made_up_cells(60, seed=2)
    before = query.X.copy()
    truth = query.obs.pop("cell_type").to_numpy(dtype=str)
    result = built.query(model, query, known_share=1.0)
    assert result is query
    assert (before != query.X).nnz == 0
    known = query.obs["mapped_cell_type"].to_numpy(dtype=str) != "Unassigned"
    assert known.mean() > 0.9
    assert (query.obs["mapped_cell_type"].to_numpy(dtype=str) == truth)[known].mean() > 0.85
    shares = query.obsm["mapped_cell_type_probabilities"]
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(query.obs["mapped_cell_type_confidence"], shares.max(1))
    names = np.array(query.uns["mapping"]["labels"]["cell_type"])
    np.testing.assert_array_equal(names[shares.argmax(1)][known], query.obs["mapped_cell_type"].to_numpy(str)[known])
    assert query.obsm["mapping_distances"].shape == query.obsm["mapping_neighbours"].shape == (60, 15)
    np.testing.assert_allclose(query.obs["mapping_distance"], query.obsm["mapping_distances"].mean(1), rtol=1e-6)
    assert query.uns["mapping"]["leave_one_out_accuracy"]["cell_type"] > 0.85
    assert query.uns["mapping"]["cells_in_reference"] == 0


def test_a_query_of_reference_cells_finds_them(model: scfm.PretrainedModel, built: ReferenceIndex) -> None:
    result = built.query(model, made_up_cells(90, seed=1), k=1)
    np.testing.assert_array_equal(result.obsm["mapping_neighbours"][:, 0], np.arange(90))
    assert (result.obsm["mapping_distances"] == 0).all()
    assert result.uns["mapping"]["cells_in_reference"] == 90


def test_cells_unlike_the_reference_are_unassigned() -> None:
    rng = np.random.default_rng(0)
    types = np.eye(8)[rng.integers(0, 3, 500)] + rng.normal(0, 0.05, (500, 8))
    vectors = types / np.linalg.norm(types, axis=1, keepdims=True)
    index = ReferenceIndex.from_vectors(
        vectors,
        {"kind": ["cell"] * 500},
        cells=np.arange(500, dtype=np.uint64),
        model={"hash": "", "source": "", "width": 8},
    )
    (limit,) = set(index.farthest_known("kind", known_share=0.99))
    novel = np.eye(8)[[5] * 20] + rng.normal(0, 0.05, (20, 8))
    distances, _ = index.neighbours(novel / np.linalg.norm(novel, axis=1, keepdims=True))
    assert (distances.mean(1) > limit).all()
    like = np.eye(8)[rng.integers(0, 3, 1000)] + rng.normal(0, 0.05, (1000, 8))
    distances, _ = index.neighbours(like / np.linalg.norm(like, axis=1, keepdims=True))
    assert (distances.mean(1) > limit).mean() < 0.03


def test_calibration_between_batches_allows_for_their_distance() -> None:
    rng = np.random.default_rng(0)
    types = np.eye(8)[np.arange(300) % 3] + rng.normal(0, 0.05, (300, 8))
    batches = (np.arange(300) // 3 % 2).astype(str)
    types[:, 7] += np.where(batches == "1", 0.6, 0.0)
    vectors = types / np.linalg.norm(types, axis=1, keepdims=True)
    about = {"cells": np.arange(300, dtype=np.uint64), "model": {"hash": "", "source": "", "width": 8}}
    labels = {"cell_type": (np.arange(300) % 3).astype(str)}
    between = ReferenceIndex.from_vectors(vectors, labels, batches=batches, **about)
    within = ReferenceIndex.from_vectors(vectors, labels, **about)
    assert min(between.farthest_known("cell_type")) > 2 * max(within.farthest_known("cell_type"))
    assert between.labels == ["cell_type"]
    with pytest.raises(ScfmError, match="has one value only"):
        ReferenceIndex.from_vectors(vectors, labels, batches=["0"] * 300, **about)


def same(one: ReferenceIndex, other: ReferenceIndex) -> None:
    queries = np.concatenate([part.vectors for part in one.content.parts])[::7]
    for mine, its in zip(one.neighbours(queries, 9), other.neighbours(queries, 9), strict=True):
        np.testing.assert_array_equal(mine, its)
    np.testing.assert_array_equal(one.farthest_known("cell_type"), other.farthest_known("cell_type"))
    assert one.leave_one_out("cell_type") == other.leave_one_out("cell_type")
    assert one.content.categories == other.content.categories


def test_a_saved_index_is_the_same_and_stays_on_the_disk(built: ReferenceIndex, tmp_path: Path) -> None:
    built.save(tmp_path / "index")
    loaded = ReferenceIndex.load(tmp_path / "index")
    same(loaded, built)
    assert not loaded.content.parts[0].vectors.flags.owndata
    names = sorted(path.name for path in (tmp_path / "index").iterdir())
    assert names == ["calibration-00001.safetensors", "index.json", "part-00000.safetensors"]


def test_extending_is_building_with_all_cells(
    model: scfm.PretrainedModel, built: ReferenceIndex, tmp_path: Path
) -> None:
    built.save(tmp_path / "index")
    first = (tmp_path / "index" / "part-00000.safetensors").stat()
    more = made_up_cells(60, seed=3)
    more.obs["cell_type"] = more.obs["cell_type"].cat.rename_categories({"T cell": "A new type"})
    index = ReferenceIndex.load(tmp_path / "index").extend(model, more, source="more.h5ad")
    index.save(tmp_path / "index")
    again = (tmp_path / "index" / "part-00000.safetensors").stat()
    assert (first.st_ino, first.st_mtime_ns) == (again.st_ino, again.st_mtime_ns)
    loaded = ReferenceIndex.load(tmp_path / "index")
    assert loaded.content.categories["cell_type"] == ["B cell", "NK cell", "T cell", "A new type"]
    assert [part.source for part in loaded.content.parts] == ["AnnData", "more.h5ad"]
    joined = made_up_cells(90, seed=1)
    joined = AnnData(
        np.concatenate([joined.X.toarray(), more.X.toarray()]),
        obs={"cell_type": [*joined.obs["cell_type"].astype(str), *more.obs["cell_type"].astype(str)]},
        var=joined.var,
    )
    same(loaded, ReferenceIndex.build(model, joined, ["cell_type"]))
    loaded.save(tmp_path / "copy")
    same(ReferenceIndex.load(tmp_path / "copy"), loaded)


def test_another_model_is_refused(
    model: scfm.PretrainedModel, another: scfm.PretrainedModel, built: ReferenceIndex
) -> None:
    for use in (built.extend, built.query):
        with pytest.raises(ScfmError, match="untrained 1: is not the model that the index was built with"):
            use(another, made_up_cells(10, seed=9))
    assert built.n_cells == 90


def test_a_new_head_is_no_other_model(model: scfm.PretrainedModel) -> None:
    other = untrained_model()
    other.files.heads.append(HeadSpec("annotation", "cls", 2, ["A", "B"]))
    other.files.tokens = type(other.files.tokens)(**{**vars(other.files.tokens), "mask_ratios": (0.1,)})
    assert other.embedding_hash() == model.embedding_hash()
    next(iter(other.network.backbone.parameters())).data[0] += 1
    assert other.embedding_hash() != model.embedding_hash()


def test_the_same_cells_twice_are_refused(model: scfm.PretrainedModel, built: ReferenceIndex) -> None:
    with pytest.raises(ScfmError, match=r"twice\.h5ad: all 90 cells are in the index already"):
        built.extend(model, made_up_cells(90, seed=1), source="twice.h5ad")


@pytest.mark.parametrize("fails_at", ["part-00001.safetensors", "calibration-00002.safetensors", "index.json"])
def test_a_crash_while_extending_leaves_the_former_index(
    model: scfm.PretrainedModel, built: ReferenceIndex, tmp_path: Path, fails_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built.save(tmp_path / "index")
    extended = ReferenceIndex.load(tmp_path / "index").extend(model, made_up_cells(30, seed=3))
    real = parts_module.os.replace

    def crash(source: Path, target: Path) -> None:
        if Path(target).name == fails_at:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(parts_module.os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            extended.save(tmp_path / "index")
    same(ReferenceIndex.load(tmp_path / "index"), built)
    retried = ReferenceIndex.load(tmp_path / "index").extend(model, made_up_cells(30, seed=3))
    retried.save(tmp_path / "index")
    assert ReferenceIndex.load(tmp_path / "index").n_cells == 120


def test_two_who_extend_at_once_do_not_lose_cells(
    model: scfm.PretrainedModel, built: ReferenceIndex, tmp_path: Path
) -> None:
    built.save(tmp_path / "index")
    one, other = ReferenceIndex.load(tmp_path / "index"), ReferenceIndex.load(tmp_path / "index")
    one.extend(model, made_up_cells(30, seed=3)).save(tmp_path / "index")
    with pytest.raises(ScfmError, match="has changed since it was read"):
        other.extend(model, made_up_cells(30, seed=4)).save(tmp_path / "index")
    assert ReferenceIndex.load(tmp_path / "index").n_cells == 120


def test_what_is_no_index_or_damaged_is_said(built: ReferenceIndex, tmp_path: Path) -> None:
    with pytest.raises(ScfmError, match="is not a reference index"):
        ReferenceIndex.load(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ScfmError, match="is not empty"):
        built.save(tmp_path / "full")
    built.save(tmp_path / "index")
    part, listed = tmp_path / "index" / "part-00000.safetensors", tmp_path / "index" / "index.json"
    whole, said = part.read_bytes(), json.loads(listed.read_text())
    part.write_bytes(whole[:-10])
    with pytest.raises(ScfmError, match=r"part-00000\.safetensors: cannot be read as safetensors"):
        ReferenceIndex.load(tmp_path / "index")
    part.write_bytes(whole)
    listed.write_text(json.dumps({**said, "parts": [{**said["parts"][0], "cells": 91}]}))
    with pytest.raises(ScfmError, match=r"index\.json says .*\(91, 32\)"):
        ReferenceIndex.load(tmp_path / "index")
    listed.write_text(json.dumps({**said, "format_version": 99}))
    with pytest.raises(ScfmError, match="format version 99"):
        ReferenceIndex.load(tmp_path / "index")
    listed.write_text("{")
    with pytest.raises(ScfmError, match=r"index\.json: cannot be read"):
        ReferenceIndex.load(tmp_path / "index")


def test_bad_requests_are_said(model: scfm.PretrainedModel, built: ReferenceIndex) -> None:
    cells = made_up_cells(10, seed=9)
    with pytest.raises(ScfmError, match="label 'celltype': is not in the index; it has cell_type"):
        built.query(model, cells, labels=["celltype"])
    with pytest.raises(ScfmError, match="k: 51 neighbours; this index is calibrated for 1 to 50"):
        built.query(model, cells, k=51)
    with pytest.raises(ScfmError, match="known_share: 0 is not a share"):
        built.query(model, cells, known_share=0)
    with pytest.raises(ScfmError, match="name at least one obs column"):
        ReferenceIndex.build(model, cells, [])
    with pytest.raises(ScfmError, match="obs has no column 'celltype'"):
        ReferenceIndex.build(model, cells, ["celltype"])
    with pytest.raises(ScfmError, match="'batch' is a label, too"):
        ReferenceIndex.build(model, cells, ["batch"], batch="batch")
    with pytest.raises(ScfmError, match="are not of length 1"):
        built.append(np.full((2, WIDTH), np.nan), {"cell_type": ["a", "b"]}, np.zeros(2, np.uint64), "x")
    with pytest.raises(ScfmError, match=r"vectors are \(2, 5\), expected \(2, 32\)"):
        built.append(np.ones((2, 5)), {"cell_type": ["a", "b"]}, np.zeros(2, np.uint64), "x")
    assert built.n_cells == 90


def test_a_sample_calibrates_a_large_index(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(400, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    about = {"cells": np.arange(400, dtype=np.uint64), "model": {"hash": "", "source": "", "width": 8}}
    whole = ReferenceIndex.from_vectors(vectors, {"cell_type": ["a"] * 400}, **about)
    monkeypatch.setattr(index_module, "CALIBRATION_CELLS", 100)
    sampled = ReferenceIndex.from_vectors(vectors, {"cell_type": ["a"] * 400}, **about)
    few, all_of_them = sampled.content.calibration, whole.content.calibration
    assert few is not None
    assert all_of_them is not None
    assert len(few.rows) == 100
    np.testing.assert_array_equal(few.distances, all_of_them.distances[few.rows])


def test_as_a_method_it_is_fitted_and_predicts(model: scfm.PretrainedModel) -> None:
    method = ReferenceMapping("mapping", model)
    train, test = made_up_cells(90, seed=1), made_up_cells(45, seed=2)
    truth = test.obs.pop("cell_type").to_numpy(dtype=str)
    predicted, shares = method.fit(train, "cell_type", seed=0).predict(test)
    assert "X_scfm" not in train.obsm
    assert shares.shape == (45, len(method.classes))
    assert (predicted == truth).mean() > 0.85
    assert method.embed(test).shape == (45, WIDTH)
    strict, _ = ReferenceMapping("strict", model, known_share=0.05).fit(train, "cell_type", 0).predict(test)
    assert (strict == "Unassigned").mean() > 0.5


@pytest.mark.realdata
def test_on_real_cells_the_promised_share_is_known_and_labels_are_those_of_knn(shared: Path) -> None:
    cells = anndata.read_h5ad(shared / "data" / "annotation" / "pbmc68k_reduced.h5ad")
    half = np.random.default_rng(0).permutation(cells.n_obs) < 350
    novel = (cells.obs["cell_type"] == "B cell").to_numpy()
    reference, query = cells[half & ~novel].copy(), cells[~half].copy()
    baseline = KNNOnPCA(components=20).fit(reference, "cell_type")

    def unit(adata: AnnData) -> np.ndarray:
        components = baseline.embed(adata)
        return components / np.linalg.norm(components, axis=1, keepdims=True)

    about = {"cells": np.arange(reference.n_obs, dtype=np.uint64), "model": {"hash": "", "source": "", "width": 20}}
    index = ReferenceIndex.from_vectors(unit(reference), {"cell_type": reference.obs["cell_type"].astype(str)}, **about)
    distances, rows = index.neighbours(unit(query))
    best = index.vote("cell_type", distances, rows).argmax(axis=1)
    beyond = distances.mean(axis=1) > index.farthest_known("cell_type", known_share=0.95)[best]
    new, truth = novel[~half], query.obs["cell_type"].to_numpy(dtype=str)
    labels = np.array(index.content.categories["cell_type"])[best]
    accuracy = (labels == truth)[~new].mean()
    assert accuracy == pytest.approx((baseline.predict(query)[0] == truth)[~new].mean(), abs=0.04)
    assert accuracy == pytest.approx(index.leave_one_out("cell_type"), abs=0.05)
    assert beyond[~new].mean() == pytest.approx(0.05, abs=0.03)
    assert beyond[new].mean() > 5 * beyond[~new].mean()
