"""A build from the first look at its sources to the finished directory: its steps, and what a stop leaves behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from scfm.data.building.assembling import make_shard, shards_of, sidecar, write_tally
from scfm.data.building.directory import (
    BUILDING,
    PLANNING,
    Interrupted,
    clear,
    locked,
    read_json,
    refuse_running_parts,
    remove,
    write_json,
)
from scfm.data.building.duplicates import DUPLICATES, find_duplicates
from scfm.data.building.finishing import finish
from scfm.data.building.options import BuildOptions, changed_options
from scfm.data.building.plan import Plan, make_plan, read_plan, why_empty
from scfm.data.building.report import PreparedReport, read_report
from scfm.data.building.survey import AGAIN, changes, survey_source
from scfm.data.building.units import is_finished, make_unit, read_facts
from scfm.data.building.workers import BYTES_PER_VALUE_HELD, BYTES_PER_VALUE_READ, GIB, Crew, sizes_for
from scfm.data.gene_table import GeneTable
from scfm.data.opening import open_source
from scfm.data.sources import VALUES_PER_BLOCK
from scfm.data.vocabulary_files import read_vocabulary
from scfm.errors import ScfmError

if TYPE_CHECKING:
    from rich.progress import Progress

WORTH_KEEPING = 2**28  # values read; with less, a build that cannot succeed leaves nothing behind
FOLDERS = ("sources", "survey", "genes", "chosen", "units", "out", "out/shards")


class Build:
    """A build: its steps in order, each of which is skipped where it is done.

    Args:
        out: where the shard directory is to stand.
        building: where it is made.
        options: what is asked for.
        labels: what the shards call each source.
        crew: who does the work.
        progress: where it is shown.
    """

    def __init__(
        self, out: Path, building: Path, options: BuildOptions, labels: list[str], crew: Crew, progress: Progress
    ) -> None:
        self.out, self.building, self.options, self.labels = out, building, options, labels
        self.crew, self.progress = crew, progress

    def make_all(self, *, merge: bool, restart: bool) -> PreparedReport:
        """Do all that is left to do; with `merge` refuse where units are missing."""
        if _is_taken(self.out) and not self.building.exists():
            raise _taken(self.out)
        with locked(self.building, "lock", BUILDING):
            refuse_running_parts(self.building)
            if _is_taken(self.out):
                self._refuse_unless_finished()
                remove(self.building)
                return read_report(self.out)
            for left in self.building.rglob("*.tmp"):  # what a killed process had begun to write
                left.unlink(missing_ok=True)
            self._begin(restart=restart)
            with self._leaving_nothing_useless():
                plan = self._plan()
                missing = self._missing_units(plan)
                if merge and missing:
                    raise Interrupted(
                        f"{self.building}: {len(missing):,} of {len(plan.units):,} units are missing; give the parts "
                        "that did not finish again (--part I/N), then --merge"
                    )
                self._make_units(plan, missing)
                self._make_shards(plan)
                finish(self.building, plan, self.options, [path for path, _ in self.options.genes])
            os.replace(self.building / "out", self.out)
            remove(self.building)
        return read_report(self.out)

    def make_part(self, part: int, parts: int) -> int:
        """Make the units of one of several parts, and return how many; who comes first makes the plan for all."""
        if _is_taken(self.out):
            raise _taken(self.out)
        with locked(self.building, f"part-{part}-of-{parts}.lock", f"making part {part} of {parts} of"):
            with locked(self.building, "lock", PLANNING, wait_while=PLANNING):
                self._begin(restart=False)
                with self._leaving_nothing_useless():
                    plan = self._plan()
            mine = [unit for unit in self._missing_units(plan) if unit % parts == part - 1]
            self._make_units(plan, mine)
        return len(mine)

    def _begin(self, *, restart: bool) -> None:
        """Refuse to go on with what was begun by other options or from other sources; make the folders.

        Raises ScfmError that says what has changed.
        """
        asked = asdict(self.options)
        begun = self.building / "options.json"
        if restart:
            clear(self.building)
        elif begun.exists():
            changed = changed_options(read_json(begun), asked)
            if changed:
                raise ScfmError(
                    f"{self.building}: a build was begun here with other options ({'; '.join(changed)}). Give the same "
                    f"options to go on with it; {AGAIN}"
                )
            if (self.building / "plan.json").exists():
                self._refuse_changed_sources(read_plan(self.building))
        for folder in FOLDERS:
            (self.building / folder).mkdir(exist_ok=True)
        write_json(begun, asked)

    def _refuse_changed_sources(self, plan: Plan) -> None:
        for source in plan.sources:
            with open_source(source.spec, True, plan.organism, plan.obs_value_filter, self.building / "sources") as now:
                changed = changes(source.fingerprint, now.fingerprint())
            if changed:
                raise ScfmError(f"{source.spec}: {changed}; it has changed since the build was begun; {AGAIN}")

    def _refuse_unless_finished(self) -> None:
        """Raise ScfmError unless what stands at the destination is this very build, killed while it was tidying up."""
        begun = self.building / "options.json"
        tidying = not (self.building / "out").exists() and (self.out / "manifest.json").is_file()
        if not tidying or (begun.exists() and changed_options(read_json(begun), asdict(self.options))):
            raise _taken(self.out)

    @contextmanager
    def _leaving_nothing_useless(self) -> Iterator[None]:
        """Remove what was begun where the sources cannot be used, unless there is much of it."""
        try:
            yield
        except Interrupted:
            raise
        except ScfmError:
            if self._values_finished() < WORTH_KEEPING:
                remove(self.building)
            raise

    def _values_finished(self) -> int:
        if not (self.building / "plan.json").exists():
            return 0
        finished = (n for n in range(len(read_plan(self.building).units)) if is_finished(self.building, n))
        return sum(int(read_facts(self.building, unit).tokens.sum()) for unit in finished)

    def _plan(self) -> Plan:
        if (self.building / "plan.json").exists():
            return read_plan(self.building)
        sizes = sizes_for(self.crew.memory, self.crew.workers)
        given = None if not self.options.vocabulary else read_vocabulary(Path(self.options.vocabulary[0]))
        table = GeneTable.read([path for path, _ in self.options.genes]) if self.options.genes else None
        sources = zip(self.options.sources, self.labels, strict=True)
        calls = [(str(self.building), n, spec, label, self.options) for n, (spec, label) in enumerate(sources)]
        task = self.progress.add_task("surveying", total=len(calls))
        for _ in self.crew.run(survey_source, calls, VALUES_PER_BLOCK * BYTES_PER_VALUE_READ):
            self.progress.advance(task)
        return make_plan(self.building, self.options, table, given, sizes)

    def _missing_units(self, plan: Plan) -> list[int]:
        return [unit for unit in range(len(plan.units)) if not is_finished(self.building, unit)]

    def _make_units(self, plan: Plan, units: list[int]) -> None:
        n_bytes = plan.values_per_block * BYTES_PER_VALUE_READ + plan.values_per_unit * BYTES_PER_VALUE_HELD
        task = self.progress.add_task("reading cells", total=sum(plan.units[n][2] - plan.units[n][1] for n in units))
        for rows in self.crew.run(make_unit, [(str(self.building), unit) for unit in units], n_bytes):
            self.progress.advance(task, rows or 0)

    def _make_shards(self, plan: Plan) -> None:
        facts = [read_facts(self.building, unit) for unit in range(len(plan.units))]
        if not (self.building / f"{DUPLICATES}.json").exists():
            n_cells = sum(len(unit.hashes) for unit in facts)
            if not n_cells:
                raise ScfmError(f"no cell is left to write: {self._why_empty(plan)}")
            write_tally(self.building, facts)
            room = max(self.crew.memory - 1, 0.1) * GIB
            find_duplicates(self.building, plan.units, n_cells, room, drop=self.options.duplicates == "drop")
        buckets = shards_of(self.building, plan)
        missing = [shard for shard in range(len(buckets)) if not sidecar(self.building, shard).exists()]
        n_bytes = plan.values_per_bucket * BYTES_PER_VALUE_HELD
        task = self.progress.add_task("writing shards", total=len(missing))
        for _ in self.crew.run(make_shard, [(str(self.building), n, buckets[n]) for n in missing], n_bytes):
            self.progress.advance(task)

    def _why_empty(self, plan: Plan) -> str:
        dropped = [dict(source.dropped) for source in plan.sources]
        for number, (source, _, _) in enumerate(plan.units):
            for reason, n in read_facts(self.building, number).dropped.items():
                dropped[source][reason] = dropped[source].get(reason, 0) + n
        return why_empty([(source.cells, lost) for source, lost in zip(plan.sources, dropped, strict=True)])


def _is_taken(out: Path) -> bool:
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


def _taken(out: Path) -> ScfmError:
    return ScfmError(f"{out}: holds something already; name another --out, or remove it first")
