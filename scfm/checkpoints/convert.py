"""`scfm convert`: checkpoints from scGPT to scfm and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from scfm.errors import ScfmError

if TYPE_CHECKING:
    from torch import Tensor

    from scfm.checkpoints.native import ModelFiles


def convert(
    source: str,
    *,
    to: Literal["native", "scgpt"],
    out: str,
    vocab: str | None = None,
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
        source: Folder of an scGPT checkpoint, its .pt file, or a native model directory.
        to: What to write: a native model directory, or args.json, vocab.json and best_model.pt as scGPT loads them.
        out: Directory to write; must not hold anything.
        vocab: scGPT's vocab.json, or a text file with a token per line, if it is not beside the weights.
        args: scGPT's args.json, if it is not beside the weights.
        preset: How an scGPT model reads cells: as its embed_data (zero_shot), or as its fine-tuning scripts.
        allow: Parts for which the tensors are right, whatever args.json says, e.g. input_norm.
        drop: Patterns of tensors to leave behind, e.g. 'cls_decoder.*'.
        labels: Text file with the names of the classes, one per line, by their index.
        batches: Text file with the names of the batches, one per line, by their index.
        genes: Tables of genes (HGNC, GENCODE, or pairs) that tell the Ensembl ids of scGPT's symbols.
        add_genes: Vocabulary file whose genes join the model's; they start from the mean gene embedding.
    """
    from scfm.checkpoints.native import write_model
    from scfm.checkpoints.scgpt.reading import read_scgpt
    from scfm.checkpoints.scgpt.writing import to_scgpt, write_scgpt

    place, target = Path(source), Path(out)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise ScfmError(f"{target}: exists already and is left as it is; choose another --out")
    lines: list[str] = []
    if is_native(place):
        given = {"--vocab": vocab, "--args": args, "--preset": preset != "zero_shot", "--allow": allow}
        given |= {"--labels": labels, "--batches": batches, "--genes": genes, "--drop": drop and to == "native"}
        idle = [option for option, value in given.items() if value]
        if idle:
            raise ScfmError(f"{', '.join(idle)}: has no meaning for {place}, a native model directory")
        if to == "native" and add_genes is None:
            raise ScfmError(f"{place}: is a native model directory already; there is nothing to convert")
        files, weights = read_native(place)
    else:
        files, weights, report = read_scgpt(
            place,
            args=args,
            vocab=vocab,
            preset=preset,
            allow=allow,
            drop=drop,
            labels=names_in(labels),
            batches=names_in(batches),
            ensembl_of=ensembl_ids(genes) if genes else None,
        )
        lines += report.lines()
        drop = ()
    if add_genes is not None:
        files, weights, n = with_added_genes(files, weights, Path(add_genes))
        lines.append(f"added {n:,} genes, each with the mean gene embedding")
    if to == "native":
        write_model(target, weights, files)
    else:
        export = to_scgpt(files, weights, drop)
        write_scgpt(target, export)
        lines += export.report.lines()
    print("\n".join([*lines, f"written: {target}"]))


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
