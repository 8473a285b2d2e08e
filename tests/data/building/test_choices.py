"""What a build takes and leaves: filters, caps, subsamples, copies, held-out groups; every cell is accounted for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from corpora import ASSAYS, corpus, dense, names, profiles, unchanged, write_source

from scfm.data.building import workers as workers_module
from scfm.data.building.finishing import COPY
from scfm.data.building.survey import ALL_ZERO, NOT_DRAWN, OVER_CAP
from scfm.data.building.units import FEW_COUNTS, FEW_GENES
from scfm.data.hashing import load_hashes
from scfm.data.prepare import prepare
from scfm.data.shards import manifest_hash, open_shards, read_manifest, verify_shards
from scfm.data.sources import NOT_PRIMARY
from scfm.errors import ScfmError


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many units, so that every choice is taken across them."""
    monkeypatch.setattr(workers_module, "VALUES_PER_UNIT", 5_000)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus") / "files")


def accounted_for(out: Path) -> None:
    """Every cell of every source was kept or dropped for one reason, and the shards hold those that were kept."""
    manifest = read_manifest(out)
    for source in manifest["sources"]:
        assert source["cells"] == source["kept"] + sum(source["dropped"].values())
    assert manifest["cells"] == sum(source["kept"] for source in manifest["sources"]) == open_shards(out).n_cells
    assert manifest["cells"] == len(load_hashes(out / "cells.hash"))
    assert manifest["hash"] == manifest_hash(manifest)
    assert verify_shards(out) == len(manifest["shards"])


def test_all_cells_of_many_units_come_back_shuffled(sources: Path, tmp_path: Path) -> None:
    prepare([sources], tmp_path / "out", obs=["cell_name"], cells_per_shard=100)
    accounted_for(tmp_path / "out")
    assert unchanged(tmp_path / "out", *(("abc"[i], profiles(n, i)) for i, n in enumerate((300, 200, 250))))
    store = open_shards(tmp_path / "out")
    assert [block.n_cells for block in store.blocks] == [94, 94, 94, 94, 94, 94, 93, 93]
    share = np.bincount(store.obs["source"].codes[:94], minlength=3) / 94
    np.testing.assert_allclose(share, [0.4, 0.27, 0.33], atol=0.2)


def test_conditions_on_obs(sources: Path, tmp_path: Path) -> None:
    where = [f"assay={ASSAYS[0]}", f"assay={ASSAYS[1]}", "tissue!=liver"]
    report = prepare([sources], tmp_path / "out", obs=["assay", "tissue"], where=where)
    store = open_shards(tmp_path / "out")
    assert set(names(store, "assay")) == set(ASSAYS[:2])
    assert set(names(store, "tissue")) == {"lung"}
    expected = sum(i % 3 != 2 and i % 10 != 0 for n in (300, 200, 250) for i in range(n))
    assert report.cells == expected
    assert report.sources[0].dropped["assay not wanted"] == 100
    accounted_for(tmp_path / "out")
    assert read_manifest(tmp_path / "out")["filters"]["where"] == where


@pytest.mark.parametrize(
    ("where", "complaint"),
    [
        ("assay", "--where 'assay': write COLUMN=VALUE"),
        ("asay=x", "a.h5ad: --where asks for obs column 'asay', which is not there; there are donor_id"),
        ("tissue=lnug", "--where 'tissue=lnug': no source has that value"),
        ("tissue!=lnug", "--where 'tissue!=lnug': no source has that value"),
    ],
)
def test_conditions_that_cannot_be_meant(sources: Path, tmp_path: Path, where: str, complaint: str) -> None:
    with pytest.raises(ScfmError, match=complaint):
        prepare([sources], tmp_path / "out", where=[where])
    assert list(tmp_path.iterdir()) == []


def test_cells_with_few_genes_or_counts_are_left_out(tmp_path: Path) -> None:
    counts = profiles(60, 0)
    counts[:10] = 0
    counts[10:20, 20:] = 0
    counts[20:30] = 0
    counts[20:30, :60] = 1
    write_source(tmp_path / "a.h5ad", counts)
    report = prepare([tmp_path / "a.h5ad"], tmp_path / "out", obs=["cell_name"], min_genes=30, min_counts=70)
    assert report.sources[0].dropped == {NOT_PRIMARY: 0, ALL_ZERO: 10, FEW_GENES: 10, FEW_COUNTS: 10}
    assert sorted(names(open_shards(tmp_path / "out"))) == sorted(f"a:{i}" for i in range(30, 60))
    accounted_for(tmp_path / "out")


def test_sources_are_capped_by_a_draw(sources: Path, tmp_path: Path) -> None:
    report = prepare([sources], tmp_path / "out", obs=["cell_name"], max_cells_per_source=220)
    assert [source.kept for source in report.sources] == [220, 200, 220]
    assert report.sources[0].dropped[OVER_CAP] == 80
    taken = [int(name[2:]) for name in names(open_shards(tmp_path / "out")) if name.startswith("a")]
    assert abs(np.mean(taken) - 149.5) < 25  # a fair draw, not the first ones
    accounted_for(tmp_path / "out")


def test_a_subsample_keeps_the_shares_of_strata(sources: Path, tmp_path: Path) -> None:
    report = prepare([sources], tmp_path / "out", obs=["tissue"], subsample=100, stratify="tissue")
    assert report.cells == 100
    assert Counter(names(open_shards(tmp_path / "out"), "tissue")) == {"lung": 90, "liver": 10}
    assert sum(source.dropped[NOT_DRAWN] for source in report.sources) == 650
    accounted_for(tmp_path / "out")
    rare = prepare([sources], tmp_path / "rare", obs=["tissue"], subsample=4, stratify="tissue")
    assert Counter(names(open_shards(tmp_path / "rare"), "tissue")) == {"lung": 3, "liver": 1}
    assert rare.cells == 4


def test_a_plain_subsample_and_one_larger_than_all(sources: Path, tmp_path: Path) -> None:
    assert prepare([sources], tmp_path / "some", subsample=123).cells == 123
    assert prepare([sources], tmp_path / "all", subsample=10_000).cells == 750
    assert prepare([sources], tmp_path / "by", subsample=75, stratify="source").cells == 75
    assert [s["kept"] for s in read_manifest(tmp_path / "by")["sources"]] == [30, 20, 25]


@pytest.fixture(scope="module")
def with_copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """b holds 40 cells of a and 10 of its own twice; both hold empty and nearly empty cells, equal by chance."""
    folder = tmp_path_factory.mktemp("copies")
    few = np.zeros((20, 150), np.float32)
    few[:, 0] = 1
    a, b = profiles(100, 0), profiles(80, 1)
    write_source(folder / "a.h5ad", np.concatenate([a, few]), dataset_id="one")
    write_source(folder / "b.h5ad", np.concatenate([a[30:70], b, b[:10], few]), dataset_id="one")
    return folder


def test_the_first_of_equal_profiles_stays(
    with_copies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = prepare([with_copies], tmp_path / "out", obs=["cell_name"], cells_per_shard=40)
    assert report.sources[0].dropped == {NOT_PRIMARY: 0, ALL_ZERO: 0}
    assert report.sources[1].dropped[COPY] == 50
    assert report.sources[1].copies == {"a.h5ad": 40, "b.h5ad": 10}
    kept = set(names(open_shards(tmp_path / "out")))
    assert kept == {f"a:{i}" for i in range(120)} | {f"b:{i}" for i in (*range(40, 120), *range(130, 150))}
    accounted_for(tmp_path / "out")
    printed = " ".join(capsys.readouterr().out.split())
    assert "b.h5ad: 40 cells with a profile that is in a.h5ad too" in printed
    assert "the same data set, as they say: a.h5ad, b.h5ad" in printed
    assert read_manifest(tmp_path / "out")["same_dataset"] == [["a.h5ad", "b.h5ad"]]


def test_copies_are_kept_on_demand_and_counted(with_copies: Path, tmp_path: Path) -> None:
    report = prepare([with_copies], tmp_path / "out", duplicates="keep")
    assert report.cells == 270
    assert report.sources[1].copies == {"a.h5ad": 40, "b.h5ad": 10}
    accounted_for(tmp_path / "out")


def test_copies_are_found_in_little_memory_alike(
    with_copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scfm.data.building import duplicates

    whole = prepare([with_copies], tmp_path / "whole")
    monkeypatch.setattr(duplicates, "BYTES_PER_HASH", 1e9)  # 3 GiB hold three hashes: about a hundred parts
    parts = prepare([with_copies], tmp_path / "parts")
    assert whole.hash == parts.hash
    assert (tmp_path / "whole/cells.hash").read_bytes() == (tmp_path / "parts/cells.hash").read_bytes()


def test_no_held_out_group_is_on_both_sides(sources: Path, tmp_path: Path) -> None:
    report = prepare([sources], tmp_path / "out", hold_out_by="donor_id", hold_out_fraction=0.2, cells_per_shard=100)
    held_out = read_manifest(tmp_path / "out")["held_out"]
    assert held_out == report.held_out
    assert held_out["by"] == "donor_id"
    assert 100 <= held_out["cells"] <= 150
    donors = names(open_shards(tmp_path / "out"), "donor_id")
    train, valid = donors[: -held_out["cells"]], donors[-held_out["cells"] :]
    assert set(valid) == set(held_out["groups"])
    assert not set(train) & set(valid)
    accounted_for(tmp_path / "out")


def test_groups_are_held_out_by_name(sources: Path, tmp_path: Path) -> None:
    prepare([sources], tmp_path / "donors", hold_out_by="donor_id", hold_out=["a-d0", "b-d3"])
    assert read_manifest(tmp_path / "donors")["held_out"] == {
        "by": "donor_id",
        "groups": ["a-d0", "b-d3"],
        "cells": 125,
    }
    prepare(
        [sources], tmp_path / "source", hold_out_by="source", hold_out=["b.h5ad"], keep_order=True, obs=["cell_name"]
    )
    assert read_manifest(tmp_path / "source")["held_out"]["cells"] == 200
    cells = names(open_shards(tmp_path / "source"))
    assert cells == [f"{source}:{i}" for source, n in (("a", 300), ("c", 250), ("b", 200)) for i in range(n)]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"hold_out_by": "donor_id"}, "neither is given"),
        ({"hold_out_by": "donor_id", "hold_out": ["x"], "hold_out_fraction": 0.1}, "both are given"),
        ({"hold_out": ["a-d0"]}, "--hold-out-by is missing"),
        ({"hold_out_by": "donor_id", "hold_out_fraction": 5}, "must lie between 0 and 1"),
        ({"hold_out_by": "donor_id", "hold_out": ["a-d9"]}, "a-d9: donor_id has no such group .* it has a-d0"),
        ({"hold_out_by": "source", "hold_out": ["a.h5ad", "b.h5ad", "c.h5ad"]}, "every group of source"),
        ({"hold_out_by": "donor", "hold_out_fraction": 0.1}, "no source has an obs column donor"),
        ({"stratify": "tissue"}, "say its size too, by --subsample"),
        ({"min_genes": -1}, "min genes: -1 must be at least 0"),
        ({"memory": 0.3}, "--memory 0.3: at least .* GiB are needed"),
        ({"workers": 0}, "workers: 0 must be at least 1"),
        ({"part": "3/2"}, "write I/N"),
        ({"part": "1/2", "merge": True}, "--part goes with neither"),
    ],
)
def test_options_that_do_not_fit_together(
    sources: Path, tmp_path: Path, options: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ScfmError, match=complaint):
        prepare([sources], tmp_path / "out", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_normalised_values_have_no_counts_to_filter_by(tmp_path: Path) -> None:
    write_source(tmp_path / "a.h5ad", np.log1p(profiles(50, 0)))
    with pytest.raises(ScfmError, match="--min-counts: the values are normalised"):
        prepare([tmp_path / "a.h5ad"], tmp_path / "out", accept_normalised=True, min_counts=5)
    with pytest.raises(ScfmError, match=r"--codec packed: it holds counts, .* use --codec list"):
        prepare([tmp_path / "a.h5ad"], tmp_path / "out", accept_normalised=True, codec="packed")
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5ad"]
    report = prepare([tmp_path / "a.h5ad"], tmp_path / "out", accept_normalised=True, obs=["cell_name"])
    assert report.cells == 50
    assert read_manifest(tmp_path / "out")["codec"] == "list"
    np.testing.assert_allclose(
        np.sort(dense(open_shards(tmp_path / "out")).sum(1)), np.sort(np.log1p(profiles(50, 0)).sum(1)), rtol=1e-5
    )
