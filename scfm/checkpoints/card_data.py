"""What a model card says of the cells that a model was trained on, and of what that keeps it from doing."""

from __future__ import annotations

from typing import Any

from scfm.checkpoints.native import ModelFiles
from scfm.data.organisms import TAXA

MOST_SOURCES = 30  # rows of the table


def data_section(files: ModelFiles) -> list[str]:
    """Return what the model was trained on, source by source, and what the model that it started from was."""
    lines, training_data = ["## Data"], files.training_data
    for stage, manifest in stages_of(training_data):
        sources = manifest["sources"]
        named = f"{stage}: " if "pretraining" in training_data else ""
        cells = sum(source["kept"] for source in sources)
        donors = {donor for source in sources for donor in source.get("origins", {}).get("donor_id", [])}
        words = [f"{cells:,} cells of {len(sources):,} source{'s' if len(sources) > 1 else ''}"]
        words += [f"{len(donors):,} donors"] if donors else []
        words += [f"organism {', '.join(organisms)}"] if (organisms := organisms_of(manifest)) else []
        held_out = manifest.get("held_out")
        validated = f"whole groups of {held_out['by']} were held out to validate" if held_out else ""
        lines += ["", f"{named}{'; '.join([', '.join(words), *([validated] if validated else [])])}.", ""]
        lines += ["| source | cells |", "|---|---|"]
        lines += [f"| {described(source)} | {source['kept']:,} |" for source in sources[:MOST_SOURCES]]
        if len(sources) > MOST_SOURCES:
            rest = sum(source["kept"] for source in sources[MOST_SOURCES:])
            lines.append(f"| {len(sources) - MOST_SOURCES:,} more, in training_data.json | {rest:,} |")
    if len(lines) == 1:
        lines += ["The run did not note its sources."]
    if files.cell_hashes is not None:
        lines += [
            "",
            "`cells.hash` holds a hash of every training cell: `scfm evaluate` counts test cells that are among them.",
        ]
    return [*lines, ""]


def stages_of(training_data: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the stages of training and the manifests of their cells, the last stage first."""
    found = []
    if training_data.get("manifest", {}).get("sources"):
        found.append((training_data.get("stage", "training"), training_data["manifest"]))
    before = training_data.get("pretraining")
    return found + (stages_of(before) if before else [])


def described(source: dict[str, Any]) -> str:
    """Return a source by its title, file and publication, as far as it says them."""
    said = source.get("provenance", {})
    title, paper = said.get("title"), said.get("citation") or said.get("doi")
    name = source["file"] if title in (None, source["file"].removesuffix(".h5ad")) else f"{title} ({source['file']})"
    return f"{name}; {paper}".replace("|", "\\|") if paper else name.replace("|", "\\|")


def organisms_of(manifest: dict[str, Any]) -> list[str]:
    """Return the organisms that the sources name, by their Latin names where these are known."""
    named = {o for source in manifest["sources"] for o in source.get("provenance", {}).get("organisms", [])}
    return sorted(TAXA.get(organism, organism) for organism in named)


def limits_section(files: ModelFiles, n_train: int, n_valid: int) -> list[str]:
    """Return what the model should not be trusted with, as far as its run tells."""
    stages = stages_of(files.training_data)
    organisms = sorted({organism for _, manifest in stages for organism in organisms_of(manifest)})
    held_out = any(manifest.get("held_out") for _, manifest in stages[:1])
    values = "raw counts" if files.value_kind == "counts" else "normalised values as those that it was trained on"
    of_whom = f" of {' and '.join(organisms)}" if organisms else ""
    lines = [
        f"It reads {values}, and no genes but the {files.vocabulary.n_genes:,} of its vocabulary: run "
        "`scfm check FILE.h5ad --model MODEL` on your own cells first.",
        f"It learned from {n_train:,} cells{of_whom}; tissues, states, organisms and assays beyond these are "
        "extrapolation.",
    ]
    if n_valid and not held_out:
        lines.append(
            "The validation cells come from the same donors and sources as the training cells: expect lower scores on "
            "other donors."
        )
    lines += [
        "A loss says little of how useful embeddings are. `scfm evaluate` sets this model beside PCA, logistic "
        "regression on genes, and others; trust it for a task on which it beats them.",
        "It is a research model, not validated for diagnosis or treatment.",
    ]
    return ["## Limitations", *(f"- {line}" for line in lines), ""]
