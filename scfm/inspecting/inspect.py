"""`scfm inspect`: what is in a shard directory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scfm.data.building.directory import building_directory
from scfm.data.opening import SUFFIXES
from scfm.data.shards import open_shards, read_manifest
from scfm.errors import ScfmError
from scfm.inspecting.contents import Contents, sizes_of
from scfm.inspecting.measuring import measure, n_sampled
from scfm.inspecting.page import render
from scfm.inspecting.terminal import print_contents


def inspect(shards: str | Path, *, out: str | Path | None = None, sample: int = 1_000_000) -> Contents:
    """Print what a shard directory holds, write a page with figures, and return it all.

    Args:
        shards: Shard directory written by `scfm prepare`.
        out: The page; without it DIR-report.html beside the directory. A page that is there is replaced.
        sample: About how many cells to read values of, drawn evenly, where there are more; 0 reads all. Cells,
            categories, expressed genes per cell and copies are of all cells in any case.

    Raises ScfmError where this is no shard directory, a shard is missing or damaged, or the page has no place.
    """
    began = time.perf_counter()
    if sample < 0:
        raise ScfmError(f"sample: {sample} must be 0 (all cells) or more")
    refuse_others(str(shards))
    page = page_path(Path(shards), out)
    contents = look_into(Path(shards), sample)
    print_contents(contents)
    with replaced(page) as file:
        file.write_text(render(contents), encoding="utf-8")
    seconds = time.perf_counter() - began
    print(f"page with figures: {page} ({contents.seconds:,.1f} s to read the shards, {seconds:,.1f} s in all)")
    return contents


def look_into(directory: Path, sample: int) -> Contents:
    """Open a shard directory and measure it, with a progress bar."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    began = time.perf_counter()
    manifest, store = read_manifest(directory), open_shards(directory)
    parts = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    clocks = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*parts, *clocks, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading cells", total=store.n_cells + n_sampled(store, sample))
        measured = measure(store, manifest, directory / "cells.hash", sample, lambda n: progress.advance(task, n))
    seconds = time.perf_counter() - began
    return Contents(directory, manifest, store.vocabulary, measured, sizes_of(directory, store), seconds)


@contextmanager
def replaced(page: Path) -> Iterator[Path]:
    """Give a file to write, which takes the name of the page when it is whole. Raises ScfmError where it cannot."""
    file = page.with_name(f"{page.name}.tmp")
    try:
        yield file
        os.replace(file, page)
    except OSError as error:
        raise ScfmError(f"{page}: the page cannot be written ({error.strerror}); give another --out") from error
    finally:
        file.unlink(missing_ok=True)


def page_path(directory: Path, out: str | Path | None) -> Path:
    """Return where the page goes. Raises ScfmError where it cannot go there: what shards stand in is left alone."""
    whole = directory.resolve()
    page = whole.with_name(f"{whole.name}-report.html") if out is None else Path(out)
    if page.resolve().is_relative_to(whole):
        raise ScfmError(f"{page}: lies in the shard directory, to which nothing is added; give another --out")
    if page.is_dir():
        raise ScfmError(f"{page}: is a directory; give --out the name of a file, such as {page / 'report.html'}")
    if not page.parent.is_dir():
        raise ScfmError(f"{page}: the directory {page.parent} does not exist; make it, or give another --out")
    if not os.access(page.parent, os.W_OK):
        raise ScfmError(f"{page}: {page.parent} cannot be written to; give another --out")
    return page


def refuse_others(shards: str) -> None:
    """Raise ScfmError that says what was given, where it is something else than a shard directory of this machine."""
    path = Path(shards)
    if "://" in shards:
        raise ScfmError(
            f"{shards}: inspect reads shards on this machine; copy the directory, or inspect the one it came from"
        )
    if not path.exists():
        if building_directory(path).exists():
            raise ScfmError(f"{shards}: is still being built; when `scfm prepare` is done, it is there")
        raise ScfmError(f"{shards}: there is no such directory")
    if (path / "manifest.json").exists():
        if any("transport" in shard for shard in read_manifest(path)["shards"]) and not any(
            path.glob("shards/*.arrow")
        ):
            raise ScfmError(
                f"{shards}: holds compressed shards (scfm compress); inspect the directory that they were made from"
            )
        return
    if path.is_file():
        advice = f"`scfm check {shards}` looks at it, `scfm prepare {shards} --out DIR` makes shards of it"
        raise ScfmError(
            f"{shards}: is a file, not a shard directory; {advice if path.suffix in SUFFIXES else 'name a directory'}"
        )
    if (path / "config.json").exists():
        raise ScfmError(f"{shards}: is a model directory, not shards; its config.json and README.md say what it is")
    if (path / "recipe.yaml").exists():
        raise ScfmError(f"{shards}: is a directory of a run, not shards; its recipe.yaml names those in data.shards")
    if any(path.glob("*.h5ad")):
        raise ScfmError(
            f"{shards}: holds h5ad files, not shards; `scfm prepare {shards} --out DIR` makes shards of them"
        )
