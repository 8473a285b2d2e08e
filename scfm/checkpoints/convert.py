"""`scfm convert`: checkpoints from scGPT and scBERT to scfm and back, and encoders to ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scfm.errors import ScfmError

if TYPE_CHECKING:
    from torch import Tensor

    from scfm.checkpoints.native import ModelFiles
    from scfm.checkpoints.report import Report


def convert(
    source: str,
    *,
    to: Literal["native", "scgpt", "scbert", "onnx"],
    out: str,
    vocabulary: str | None = None,
    args: str | None = None,
    preset: Literal["zero_shot", "finetuned"] = "zero_shot",
    allow: Sequence[str] = (),
    drop: Sequence[str] = (),
    labels: str | None = None,
    batches: str | None = None,
    genes: Sequence[str] = (),
    add_genes: str | None = None,
) -> None:
    """Convert a checkpoint, strictly: what does not fit is listed, with the option that allows it where one exists.

    Args:
        source: Folder of an scGPT checkpoint, its .pt file, the .pth file of scBERT, or a native model directory.
        to: What to write: a native model directory; args.json, vocab.json and best_model.pt as scGPT loads them;
            scbert.pth and genes.txt, which names its rows; or model.onnx, the encoder (genes and values to cell
            embeddings) for runtimes without torch, checked beside the model.
        out: Directory to write; must not hold anything.
        vocabulary: scGPT's vocab.json, or a text file with a token per line, if it is not beside the weights. For
            scBERT, whose files hold no names, a text file with a gene per line or a vocab.json: the order of genes that
            the file has; or, to write one, that it shall have, if not the model's.
        args: scGPT's args.json, if it is not beside the weights.
        preset: How an scGPT model reads cells: as its embed_data (zero_shot), or as its fine-tuning scripts.
        allow: Parts for which the tensors are right, whatever args.json says, e.g. input_norm.
        drop: Patterns of tensors to leave behind, e.g. 'cls_decoder.*'.
        labels: Text file with the names of the classes, one per line, by their index.
        batches: Text file with the names of the batches, one per line, by their index.
        genes: Tables of genes (HGNC, GENCODE, or pairs) that tell the Ensembl ids of the checkpoint's symbols.
        add_genes: Vocabulary file whose genes join an scGPT model's; they start from the mean gene embedding.
    """
    from scfm.checkpoints.native import write_model

    place, target = Path(source), Path(out)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise ScfmError(f"{target}: exists already and is left as it is; choose another --out")
    lines: list[str] = []
    of_scgpt = {"--args": args, "--preset": preset != "zero_shot", "--allow": allow, "--batches": batches}
    order = None
    if is_native(place):
        given = {**of_scgpt, "--labels": labels, "--genes": genes, "--drop": drop and to in ("native", "onnx")}
        refuse_idle({**given, "--vocabulary": vocabulary and to != "scbert"}, f"{place}, a native model directory")
        if to == "native" and add_genes is None:
            raise ScfmError(f"{place}: is a native model directory already; there is nothing to convert")
        files, weights = read_native(place)
        order = vocabulary
    else:
        files, weights, report = read_original(
            place,
            of_scgpt,
            vocabulary=vocabulary,
            drop=drop,
            labels=names_in(labels),
            ensembl_of=ensembl_ids(genes) if genes else None,
        )
        lines += report.lines()
        drop = ()
    if add_genes is not None:
        files, weights, n = with_added_genes(files, weights, Path(add_genes))
        lines.append(f"added {n:,} genes, each with the mean gene embedding")
    if to == "native":
        write_model(target, weights, files)
    elif to == "onnx":
        from scfm.checkpoints.onnx import write_onnx

        error = write_onnx(target, files, weights)
        lines.append(f"encoder: cell embeddings equal the model's within {error:.1e} (onnxruntime beside torch)")
    else:
        lines += write_original(to, target, files, weights, drop, order).lines()
    print("\n".join([*lines, f"written: {target}"]))


def refuse_idle(given: dict[str, Any], where: str) -> None:
    """Raise ScfmError for options that were given and have no meaning for a source."""
    idle = [option for option, value in given.items() if value]
    if idle:
        raise ScfmError(f"{', '.join(idle)}: has no meaning for {where}")


def read_original(
    place: Path, of_scgpt: dict[str, Any], **options: Any
) -> tuple[ModelFiles, dict[str, Tensor], Report]:
    """Read a checkpoint of scBERT or scGPT, whichever its names say; return as those readers do.

    Args:
        place: the file, or its folder.
        of_scgpt: options by their names on the command line that only scGPT's checkpoints need.
        **options: what both readers take.
    """
    from scfm.checkpoints.scbert.reading import is_scbert, read_scbert
    from scfm.checkpoints.scgpt.reading import read_scgpt
    from scfm.checkpoints.torch_files import read_content, weights_file

    if is_scbert(read_content(weights_file(place))):
        refuse_idle(of_scgpt, f"{place}, a checkpoint of scBERT")
        return read_scbert(place, **options)
    return read_scgpt(
        place,
        args=of_scgpt["--args"],
        preset="finetuned" if of_scgpt["--preset"] else "zero_shot",
        allow=of_scgpt["--allow"],
        batches=names_in(of_scgpt["--batches"]),
        **options,
    )


def write_original(
    to: str, target: Path, files: ModelFiles, weights: dict[str, Tensor], drop: Sequence[str], order: str | None
) -> Report:
    """Write a model as the program that `to` names keeps it; return what was done."""
    from scfm.checkpoints.scbert.writing import to_scbert, write_scbert
    from scfm.checkpoints.scgpt.writing import to_scgpt, write_scgpt
    from scfm.data.vocabulary_files import read_vocabulary

    if to == "scgpt":
        export = to_scgpt(files, weights, drop)
        write_scgpt(target, export)
        return export.report
    exported = to_scbert(files, weights, drop, read_vocabulary(Path(order)) if order else None)
    write_scbert(target, exported)
    return exported.report


def is_native(place: Path) -> bool:
    """Say whether a place is a native model directory. Raises ScfmError where there is nothing."""
    if not place.exists():
        raise ScfmError(f"{place}: there is no such checkpoint")
    return (place / "config.json").is_file() and (place / "model.safetensors").is_file()


def read_native(folder: Path) -> tuple[ModelFiles, dict[str, Tensor]]:
    """Return a native model without building its network. Raises ScfmError where its weights are not those it needs."""
    import torch

    from scfm.checkpoints.native import check_weights, read_model, read_weights

    files, weights = read_model(folder), read_weights(folder)
    with torch.device("meta"):  # names and shapes only
        check_weights(files.build().state_dict(), weights, str(folder))
    return files, weights


def names_in(path: str | None) -> list[str] | None:
    """Return the lines of a text file. Raises ScfmError where it cannot be read."""
    if path is None:
        return None
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ScfmError(f"{path}: cannot be read as a list of names ({error})") from error


def ensembl_ids(tables: Sequence[str]) -> dict[str, str]:
    """Return symbol -> Ensembl id of gene tables, without symbols that several genes bear."""
    from scfm.data.gene_table import GeneTable

    table = GeneTable.read(tables)
    known = {gene.symbol: gene.ensembl for gene in table.genes if gene.symbol and gene.ensembl}
    return {symbol: ensembl for symbol, ensembl in known.items() if not table.is_ambiguous(symbol)}


def with_added_genes(
    files: ModelFiles, weights: dict[str, Tensor], path: Path
) -> tuple[ModelFiles, dict[str, Tensor], int]:
    """Add the genes of a vocabulary file to a model; also return how many were new."""
    from scfm.checkpoints.add_genes import add_genes
    from scfm.data.vocabulary_files import read_vocabulary

    listed = read_vocabulary(path)
    extended, more = add_genes(files, weights, listed.entries[: listed.n_genes])
    return extended, more, extended.vocabulary.n_genes - files.vocabulary.n_genes
