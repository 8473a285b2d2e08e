"""`scfm embed` and `scfm predict`: a model over an h5ad file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scfm.data.gene_table import GeneTable
from scfm.data.orthologs import Orthologs
from scfm.errors import ScfmError
from scfm.gene_attention import write_top_genes
from scfm.model.precision import Precision

if TYPE_CHECKING:
    from anndata import AnnData

    from scfm.pretrained import PretrainedModel


def embed(
    file: str,
    *,
    model: str,
    out: str,
    tokens_per_pack: int = 16384,
    accept_normalised: bool = False,
    genes: Sequence[str] = (),
    orthologs: str | None = None,
    precision: Precision = "fp32",
) -> None:
    """Write the cell embedding into `.obsm["X_scfm"]`, and where it came from into `.uns["scfm"]`.

    Args:
        file: h5ad file with raw counts.
        model: Model directory.
        out: h5ad file to write; must not exist.
        tokens_per_pack: Most tokens in one forward pass; lower it where memory is short.
        accept_normalised: Take values that are not counts; bins keep only their order within a cell.
        genes: Tables of genes (HGNC, GENCODE ...), the most trusted first, by which more names are matched.
        orthologs: Table of orthologs, for cells of another organism than the model's: they are matched one to one.
        precision: bf16 is faster where the device has bf16 instructions, and close to fp32, not equal.
    """
    options: dict[str, Any] = {"tokens_per_pack": tokens_per_pack, "accept_normalised": accept_normalised}
    options["precision"] = precision
    options["genes"] = GeneTable.read(genes) if genes else None
    options["orthologs"] = Orthologs.read(orthologs) if orthologs else None
    over_file(file, model, out, lambda loaded, adata: loaded.embed(adata, **options))


def predict(
    file: str,
    *,
    model: str,
    out: str,
    tokens_per_pack: int = 16384,
    accept_normalised: bool = False,
    genes: Sequence[str] = (),
    orthologs: str | None = None,
    precision: Precision = "fp32",
    unassigned_below: float | None = None,
    gene_attention: bool = False,
    plots: str | None = None,
) -> None:
    """Write predicted labels into `.obs`, all probabilities into `.obsm`, and where they came from into `.uns["scfm"]`.

    Args:
        file: h5ad file with raw counts.
        model: Model directory with a head that predicts labels.
        out: h5ad file to write; must not exist.
        tokens_per_pack: Most tokens in one forward pass; lower it where memory is short.
        accept_normalised: Take values that are not counts; bins keep only their order within a cell.
        genes: Tables of genes (HGNC, GENCODE ...), the most trusted first, by which more names are matched.
        orthologs: Table of orthologs, for cells of another organism than the model's: they are matched one to one.
        precision: bf16 is faster where the device has bf16 instructions, and close to fp32, not equal.
        unassigned_below: Label cells whose largest probability is lower `Unassigned` (scBERT, novel types: 0.5).
        gene_attention: Write into `.layers` how much each gene is attended to, for models that tell (scBERT).
        plots: With --gene-attention, folder for the plot and the table of the top genes of each predicted type.
    """
    if plots is not None and not gene_attention:
        raise ScfmError("--plots: shows the genes that cells attend to; give --gene-attention with it")
    options: dict[str, Any] = {"tokens_per_pack": tokens_per_pack, "accept_normalised": accept_normalised}
    options["precision"] = precision
    options["genes"] = GeneTable.read(genes) if genes else None
    options["orthologs"] = Orthologs.read(orthologs) if orthologs else None
    options |= {"unassigned_below": unassigned_below, "gene_attention": gene_attention}
    predicted = over_file(file, model, out, lambda loaded, adata: loaded.predict(adata, **options))
    if plots is not None:
        for task in (task for task in predicted.uns["scfm"]["labels"] if task in predicted.obs):
            print(f"top genes: {write_top_genes(predicted, task, Path(plots))}")


def over_file(file: str, model: str, out: str, work: Callable[[PretrainedModel, AnnData], AnnData]) -> AnnData:
    """Read, work, write under a temporary name before renaming, and return what was written."""
    from scfm.pretrained import load

    target = Path(out)
    if target.exists():
        raise ScfmError(f"{target}: exists already and is left as it is; choose another --out")
    adata = read_anndata(Path(file))
    result = work(load(model), adata)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    result.write_h5ad(partial)
    partial.rename(target)
    print(f"{result.n_obs:,} cells: {target}")
    return result


def read_anndata(path: Path) -> AnnData:
    """Return the content of an h5ad file. Raises ScfmError where it cannot be read as one."""
    import anndata

    try:
        return anndata.read_h5ad(path)
    except Exception as error:
        raise ScfmError(f"{path}: cannot be read as h5ad ({type(error).__name__}: {error})") from error
