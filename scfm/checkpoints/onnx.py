"""The encoder of a model as ONNX, for runtimes without torch: genes and values in, cell embeddings out.

    model.onnx    genes (cells, tokens) int64, values (cells, tokens) float32, mask (cells, tokens) bool
                  [, domain (cells,) int64] -> cell (cells, width) float32, L2-normalised as `embed` gives it
    vocab.json    what the gene ids mean
    README.md     how cells become these inputs

Any number of cells and tokens. The file is compared with the network by onnxruntime before it takes its place.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scfm.checkpoints.native import ModelFiles, load_weights
from scfm.data.batch import PackedBatch
from scfm.errors import ScfmError
from scfm.model.padded_encoder import PaddedEncoder
from scfm.version import __version__

if TYPE_CHECKING:
    from torch import nn

OPSET = 20
TOLERANCE = 1e-4  # between unit vectors of two runtimes in float32; rounding alone stays below 1e-5
PACKAGES = ("onnx", "onnxruntime", "onnxscript")

README = """# Encoder of a {name} model as ONNX

Written by scfm {version}; equal to `scfm.load(...).embed` within {error:.1e} on {cells} cells when it was written.

```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
cell = session.run(["cell"], {{"genes": genes, "values": values, "mask": mask{domain}}})[0]  # (cells, {width})
```

- `genes` (cells, tokens) int64: places in the list of `vocab.json`; first `<cls>`, {cls}, then {which}.
- `values` (cells, tokens) float32: {values}; `<cls>` has {cls_value:g}.
- `mask` (cells, tokens) bool: False for padding, at the end of a cell, which may hold gene 0 and value 0.
{domain_line}- `cell`: the cell embedding, of length 1.

The metadata of the file (`scfm.*`) say the same for programs: vocabulary hash, number of bins, tokenisation, version.
From Python `scfm.checkpoints.onnx.inputs_of` makes these arrays of the packs of `scfm.load(model).packs(...)`.
"""


def write_onnx(folder: Path, files: ModelFiles, weights: dict[str, Tensor]) -> float:
    """Write model.onnx, vocab.json and README.md into a new folder; return the largest error beside the network.

    Raises:
        ScfmError: a package is missing, the model's form cannot be exported, or the file does not compute what the
            network does.
    """
    expect_packages()
    network = files.build()
    load_weights(network, weights, "the model")
    network.eval()
    encoder = PaddedEncoder(network, files.model, files.gene_tables)
    packs = trial_packs(files)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        export(encoder, inputs_of(packs[0], files), partial / "model.onnx", metadata_of(files))
        error = compare(partial / "model.onnx", network, files, packs)
        if not error < TOLERANCE:
            raise ScfmError(
                f"{folder}: the exported encoder differs from the model by {error:.2g} in the cell embeddings, more "
                f"than {TOLERANCE:g}; please report the model's config.json with the versions of torch and onnxruntime"
            )
        files.vocabulary.save(partial / "vocab.json")
        n_cells = sum(pack.n_cells for pack in packs)
        (partial / "README.md").write_text(readme(files, error, n_cells), encoding="utf-8")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return error


def expect_packages() -> None:
    """Raise ScfmError where a package that exports or checks is missing."""
    from importlib.util import find_spec

    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ScfmError(f"convert --to onnx: needs {', '.join(missing)}; pip install 'scfm[onnx]'")


def export(encoder: PaddedEncoder, example: dict[str, NDArray], path: Path, metadata: dict[str, str]) -> None:
    """Write an encoder as ONNX with any number of cells and tokens."""
    given = {name: torch.from_numpy(array) for name, array in example.items()}
    cells, tokens = torch.export.Dim("cells"), torch.export.Dim("tokens")
    dims: dict[str, Any] = {name: {0: cells, 1: tokens} for name in ("genes", "values", "mask")}
    if "domain" in given:
        dims["domain"] = {0: cells}
    with quiet():
        program: Any = torch.onnx.export(
            encoder,
            kwargs=given,
            dynamo=True,
            dynamic_shapes=dims,
            input_names=list(given),
            output_names=["cell"],
            opset_version=OPSET,
            verbose=False,
        )
        program.model.metadata_props.update(metadata)
        program.save(path)


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what exporters say of themselves."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def metadata_of(files: ModelFiles) -> dict[str, str]:
    """Return what the file says of itself; all values are texts, as ONNX has them."""
    vocabulary = files.vocabulary
    return {
        "scfm.version": __version__,
        "scfm.model": files.model.name,
        "scfm.vocabulary_hash": vocabulary.hash,
        "scfm.n_bins": str(files.tokens.n_bins),
        "scfm.value_kind": files.value_kind,
        "scfm.tokens": json.dumps(asdict(files.tokens)),
        "scfm.cls": str(vocabulary.cls),
        "scfm.pad": str(vocabulary.pad),
        "scfm.genes_read": json.dumps(files.genes_read),
        "scfm.domains": json.dumps(files.cell_conditions.get(files.model.domain or "", [])),
    }


def inputs_of(pack: PackedBatch, files: ModelFiles) -> dict[str, NDArray]:
    """Return the cells of a pack as the padded arrays that the ONNX file takes, by name."""
    lengths = pack.lengths.numpy()
    shape = (len(lengths), int(lengths.max()))
    mask = np.arange(shape[1]) < lengths[:, None]
    genes, values = np.full(shape, files.vocabulary.pad, np.int64), np.zeros(shape, np.float32)
    genes[mask], values[mask] = pack.genes.numpy(), pack.values.numpy()
    domain = files.model.domain
    arrays: dict[str, NDArray] = {"genes": genes, "values": values, "mask": mask}
    return arrays | ({"domain": pack.cell_conditions[domain].numpy()} if domain else {})


def compare(path: Path, network: nn.Module, files: ModelFiles, packs: Sequence[PackedBatch]) -> float:
    """Return the largest difference of a cell embedding between an ONNX file and the network on packed cells."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for pack in packs:
        with torch.inference_mode():
            expected = torch.nn.functional.normalize(network(pack).cell.float(), dim=-1).numpy()
        found = session.run(["cell"], inputs_of(pack, files))[0]
        worst = max(worst, float(np.abs(found - expected).max())) if np.isfinite(found).all() else float("inf")
    return worst


def trial_packs(files: ModelFiles, seed: int = 0) -> list[PackedBatch]:
    """Return made-up cells of the model's genes, of several lengths and numbers, to compare two runtimes by."""
    rng = np.random.default_rng(seed)
    vocabulary, tokens = files.vocabulary, files.tokens
    readable = np.arange(vocabulary.n_genes) if files.entries_read is None else files.entries_read
    longest = min(len(readable), tokens.max_genes, 400)
    packs = []
    for n_cells in (3, 1, 5):
        lengths = [longest] * n_cells if tokens.genes == "all" else rng.integers(1, longest + 1, n_cells).tolist()
        genes, values = [], []
        for n in lengths:
            genes += [vocabulary.cls, *np.sort(rng.choice(readable, n, replace=False)).tolist()]
            drawn = rng.exponential(3.0, n) if tokens.values == "raw" else rng.integers(0, tokens.n_bins, n)
            values += [tokens.cls_value, *drawn.tolist()]
        ends = np.cumsum([0, *(n + 1 for n in lengths)])
        tables = {name: torch.tensor(table)[torch.tensor(genes)] for name, table in files.gene_tables.items()}
        conditions = {
            name: torch.from_numpy(rng.integers(-1, len(names), n_cells))
            for name, names in files.cell_conditions.items()
        }
        packs.append(
            PackedBatch(
                genes=torch.tensor(genes, dtype=torch.int32),
                values=torch.tensor(values, dtype=torch.float32),
                targets=None,
                cu_seqlens=torch.tensor(ends, dtype=torch.int32),
                n_known=torch.tensor(np.diff(ends), dtype=torch.int32),
                cell_id=torch.arange(n_cells),
                gene_conditions=tables,
                cell_conditions=conditions,
            )
        )
    return packs


def readme(files: ModelFiles, error: float, n_cells: int) -> str:
    """Return in words, for people, what the inputs are."""
    tokens, domain = files.tokens, files.model.domain
    which = {
        "expressed": f"the expressed genes, at most {tokens.max_genes:,}",
        "all": "every gene that the model reads, zeros included",
    }[tokens.genes]
    values = {
        "binned": f"bins, 0 for 0 and 1 to {tokens.n_bins - 1} by the quantiles of the cell's own expressed genes",
        "log2": f"log2(1 + counts per 10,000) rounded down, at most {tokens.n_bins - 1}",
        "raw": "the values as they are",
    }[tokens.values]
    named = ", ".join(files.cell_conditions.get(domain or "", []))
    of_domain = f"- `domain` (cells,) int64: place of its {domain} in [{named}], -1 for another.\n"
    return README.format(
        name=files.model.name,
        version=__version__,
        error=error,
        cells=n_cells,
        width=files.model.width,
        cls=f"entry {files.vocabulary.cls}",
        which=which,
        values=values,
        cls_value=tokens.cls_value,
        domain=', "domain": domain' if domain else "",
        domain_line=of_domain if domain else "",
    )
