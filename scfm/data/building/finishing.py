"""The end of a build: what the units and shards say of themselves becomes the manifest."""

from __future__ import annotations

import re
import shutil
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from scfm.data.building.assembling import read_sidecar, shards_of
from scfm.data.building.duplicates import read_duplicates
from scfm.data.building.options import BuildOptions
from scfm.data.building.plan import Plan
from scfm.data.building.report import SourceReport
from scfm.data.building.survey import Surveyed, read_survey
from scfm.data.building.units import read_facts
from scfm.data.shards import write_manifest
from scfm.data.vocabulary import Vocabulary

COPY = "copy of another cell"
DATASET_VERSION = re.compile(r"datasets\.cellxgene\.cziscience\.com/([0-9a-f-]{36})\.h5ad")


def finish(building: Path, plan: Plan, options: BuildOptions, gene_tables: list[str]) -> None:
    """Write vocab.json and the manifest into `out/`, which is then a whole shard directory."""
    surveyed = [read_survey(building, number) for number in range(len(plan.sources))]
    vocabulary = Vocabulary.load(building / "vocab.json")
    shutil.copyfile(building / "vocab.json", building / "out/vocab.json")
    buckets = shards_of(building, plan)
    shards = [read_sidecar(building, shard) for shard in range(len(buckets))]
    held = sum(s["cells"] for s, bucket in zip(shards, buckets, strict=True) if bucket >= plan.n_buckets[0])
    held_out = {"by": plan.held_out_by, "groups": plan.held_out, "cells": held}
    filters = {name: getattr(options, name) for name in FILTERS}
    write_manifest(
        building / "out",
        vocabulary,
        plan.value_kind,
        plan.codec,
        plan.categories,
        shards,
        [asdict(report) for report in source_reports(building, plan, surveyed, options)],
        shuffled=not options.keep_order,
        seed=options.seed,
        gene_tables=gene_tables,
        filters=filters,
        duplicates=options.duplicates,
        same_dataset=same_dataset(surveyed),
        held_out=held_out if held else None,
    )


FILTERS = ("where", "min_genes", "min_counts", "max_cells_per_source", "subsample", "stratify")


def source_reports(building: Path, plan: Plan, surveyed: list[Surveyed], options: BuildOptions) -> list[SourceReport]:
    """Return what became of the cells of each source."""
    found = read_duplicates(building).copies
    kept: Counter[int] = Counter()
    dropped: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for unit, (number, _, _) in enumerate(plan.units):
        facts = read_facts(building, unit)
        kept[number] += len(facts.places)
        dropped[number].update(facts.dropped)
    reports = []
    for number, (planned, source) in enumerate(zip(plan.sources, surveyed, strict=True)):
        copies = sum(found.get(number, {}).values()) if options.duplicates == "drop" else 0
        reasons = Counter(planned.dropped)
        reasons.update(dropped[number])
        reasons.update({COPY: copies} if copies else {})
        entries = np.load(building / f"genes/{planned.gene_list}.npy")
        reports.append(
            SourceReport(
                file=planned.label,
                cells=planned.cells,
                kept=kept[number] - copies,
                dropped=dict(reasons),
                genes=source.genes,
                genes_matched=int((entries >= 0).sum()),
                provenance=source.provenance,
                fingerprint=planned.fingerprint,
                copies={plan.sources[first].label: n for first, n in found.get(number, {}).items()},
                origins=source.origins,
            )
        )
    return reports


def same_dataset(surveyed: list[Surveyed]) -> list[list[str]]:
    """Return the sources that say that they hold the same data set, by dataset id or by the version that they cite."""
    labels: defaultdict[str, list[str]] = defaultdict(list)
    for source in surveyed:
        for name in _datasets_in(source.provenance):
            labels[name].append(source.label)
    # two releases of the Census share a thousand data sets, and are one line
    return [list(files) for files in dict.fromkeys(tuple(files) for files in labels.values()) if len(files) > 1]


def _datasets_in(provenance: dict[str, Any]) -> list[str]:
    """Return the names of the data sets of a source: a file is of one at most, a Census of many."""
    of_census = provenance.get("datasets", {})
    cited = [DATASET_VERSION.search(said.get("citation", "")) for said in (provenance, *of_census.values())]
    names = [provenance.get("dataset_id"), *of_census, *(version[1] for version in cited if version)]
    return list(dict.fromkeys(name for name in names if name))
