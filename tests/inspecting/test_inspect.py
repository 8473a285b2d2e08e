"""`scfm inspect` as a user meets it: the terminal, the page, and what is refused."""

from __future__ import annotations

import base64
import errno
import io
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from cells import write_cells
from corpora import profiles, write_source
from rich.console import Console

from scfm.cli import main
from scfm.data.prepare import prepare
from scfm.data.transport import compress
from scfm.errors import ScfmError
from scfm.inspecting import plots
from scfm.inspecting.contents import Contents
from scfm.inspecting.inspect import inspect, look_into, page_path, replaced
from scfm.inspecting.measuring import RUN
from scfm.inspecting.page import render, table_html
from scfm.inspecting.tables import Table, rounded, share
from scfm.inspecting.terminal import histogram_lines, print_contents


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)))


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def printed(contents: Contents) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    print_contents(contents, console)
    return plain(console.export_text())


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take seconds to draw."""
    for name in ("composition", "per_cell", "lengths_by_group", "values", "genes"):
        monkeypatch.setattr(plots, name, lambda *_: b"png")


def test_the_terminal_and_the_page_say_the_same(shards: Path, no_figures: None) -> None:
    contents = look_into(shards, 0)
    for shown in (printed(contents), text_of(render(contents))):
        assert f"{contents.measured.cells:,} cells, 150 genes" in shown
        assert "149 of 150 genes of the vocabulary are expressed" in shown
        assert all(f"Cells by {column}" in shown for column in ("tissue", "assay", "donor_id", "cell_name"))
        assert "7 cells with the profile of an earlier cell were left out (7 of b.h5ad in a.h5ad)" in shown
        assert "249 assay unwanted, 7 copy of another cell" in shown
        assert "assay!=Smart-seq2" in shown
        assert "of donor_id (" in shown
        assert f"{contents.manifest['codec']}; " in shown
        assert "1 never expressed" in shown
        assert contents.manifest["hash"] in shown


def test_the_page_is_written_beside_the_shards_and_stands_alone(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare([files], tmp_path / "shards", obs=["tissue", "assay"])
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "shards").rglob("*"))
    assert main(["inspect", str(tmp_path / "shards")]) == 0
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "shards").rglob("*")) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards", "shards-report.html"]
    page = (tmp_path / "shards-report.html").read_text()
    assert "page with figures" in capsys.readouterr().out
    pictures = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    assert len(pictures) == page.count("<img") == 6
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<script" not in page
    assert "title of b" in page


def test_a_sample_is_said(shards: Path, no_figures: None) -> None:
    contents = look_into(shards, 2 * RUN)
    for shown in (printed(contents), text_of(render(contents))):
        assert f"{contents.measured.sampled:,} cells" in shown
        assert f"run of up to {RUN} neighbouring cells" in shown
        assert "1 never expressed in the sample" in shown
    assert "sampled cells" in text_of(render(contents))


def test_names_from_files_are_text(tmp_path: Path) -> None:
    write_cells(tmp_path / "<b>[red]x.h5ad")
    prepare([tmp_path / "<b>[red]x.h5ad"], tmp_path / "shards")
    contents = look_into(tmp_path / "shards", 0)
    assert "<b>[red]x.h5ad" in printed(contents)
    assert "&lt;b&gt;[red]x.h5ad" in table_html(1, contents.tables()[0])


def test_long_tables_unfold() -> None:
    table = Table("Cells", "", ["name", "cells"], [[f"n{k}", "1"] for k in range(1200)])
    page = table_html(1, table)
    assert page.count("<tr>") == 1000 + 2
    assert "1,185 more (the first 985 of them)" in page
    assert "<details>" not in table_html(1, Table("Cells", "", ["name", "cells"], table.rows[:18]))


def refused(shards: Path | str, **options: object) -> str:
    with pytest.raises(ScfmError) as error:
        inspect(shards, **options)  # type: ignore[arg-type]
    return str(error.value)


def test_nothing_is_written_into_the_shards(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "lies in the shard directory" in refused(shards, out=shards / "page.html")
    assert "does not exist; make it" in refused(shards, out=tmp_path / "none/page.html")
    assert "is a directory; give --out the name of a file" in refused(shards, out=tmp_path)
    monkeypatch.chdir(shards)
    assert page_path(Path(), None) == shards.parent / "shards-report.html"


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    def fill_the_disk() -> None:
        with replaced(tmp_path / "page.html") as file:
            file.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ScfmError, match=r"page.html: the page cannot be written \(No space left on device\)"):
        fill_the_disk()
    assert not list(tmp_path.iterdir())


def test_what_is_not_a_shard_directory_is_named(shards: Path, files: Path, tmp_path: Path) -> None:
    assert "there is no such directory" in refused(tmp_path / "none")
    (tmp_path / ".half.building").mkdir()
    assert "is still being built" in refused(tmp_path / "half")
    assert "is a file, not a shard directory; `scfm check" in refused(files / "a.h5ad")
    assert "holds h5ad files, not shards; `scfm prepare" in refused(files)
    (tmp_path / "model").mkdir()
    assert "no manifest.json" in refused(tmp_path / "model")
    (tmp_path / "model/config.json").write_text("{}")
    assert "is a model directory" in refused(tmp_path / "model")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text("seed: 0")
    assert "is a directory of a run" in refused(tmp_path / "run")
    compress(str(shards), out=str(tmp_path / "small"))
    assert "holds compressed shards" in refused(tmp_path / "small")
    assert "inspect reads shards on this machine" in refused("s3://bucket/corpus")
    assert "-1 must be 0" in refused(shards, sample=-1)


def test_a_shard_that_is_cut_off_is_named(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "cut")
    cut = tmp_path / "cut/shards/00001.arrow"
    cut.write_bytes(cut.read_bytes()[:-10])
    assert "00001.arrow" in refused(tmp_path / "cut")
    assert not (tmp_path / "cut-report.html").exists()


def test_normalised_values_in_the_order_of_one_source(tmp_path: Path) -> None:
    write_source(tmp_path / "n.h5ad", profiles(60, 0) / 7)
    prepare([tmp_path / "n.h5ad"], tmp_path / "shards", accept_normalised=True, keep_order=True)
    contents = look_into(tmp_path / "shards", 0)
    page = text_of(render(contents))
    for shown in (printed(contents), page):
        assert "normalised values" in shown
        assert "(--keep-order)" in shown
        assert "50% 0.14 " in shown  # the commonest value is 1 / 7
    assert "Counts" not in page
    assert contents.measured.totals.sum() == 0


def test_shares_and_rounding_never_say_what_is_not_so() -> None:
    assert [share(*pair) for pair in ((0, 5), (5, 5), (1, 10**6), (999_999, 10**6), (1, 200), (1, 3), (1, 0))] == [
        "0.0%",
        "100.0%",
        "<0.01%",
        ">99.9%",
        "0.50%",
        "33.3%",
        "",
    ]
    assert [rounded(number) for number in (7.0, 417.5, 23_412.0, float("nan"))] == ["7", "418", "23,400", ""]


def test_the_histogram_of_a_terminal_holds_every_cell() -> None:
    cells = np.bincount(np.random.default_rng(0).lognormal(7, 0.7, 5000).astype(int))
    lines = histogram_lines(cells)
    assert 6 <= len(lines) <= 16
    assert sum(int(re.search(r"([\d,]+) \(", line)[1].replace(",", "")) for line in lines) == 5000  # type: ignore[index]
    assert lines[-1].split()[1:3] == ["or", "more"]
    assert histogram_lines(np.zeros(5, np.int64)) == []
