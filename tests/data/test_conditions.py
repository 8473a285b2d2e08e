"""Gene conditions: a table of genes becomes an index for every vocabulary entry."""

from __future__ import annotations

from pathlib import Path

import pytest
from cells import made_up_cells
from runs import tiny_recipe, write_shards

import scfm
from scfm.checkpoints.native import read_model, read_weights
from scfm.data.conditions import read_gene_condition
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.errors import ScfmError
from scfm.training.run import pretrain

VOCABULARY = Vocabulary.from_genes([Gene.of("ENSG00000000001", "A"), Gene.of(None, "B"), Gene.of(None, "C")])


def table(folder: Path, *rows: str, header: str = "gene\tcondition") -> Path:
    path = folder / "pathway.tsv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_genes_by_id_or_symbol_and_none_for_the_rest(tmp_path: Path) -> None:
    path = table(tmp_path, "ENSG00000000001.3\tstress", "C\tcycle", "elsewhere\tcycle")
    indices, names = read_gene_condition(path, VOCABULARY)
    assert names == ["none", "cycle", "stress"]
    assert {gene: names[i] for gene, i in zip(VOCABULARY.names, indices, strict=True)} == {
        "A": "stress", "B": "none", "C": "cycle", "<pad>": "none", "<cls>": "none",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (["A\tx"], "symbol\tcondition", "`gene` and `condition` are needed"),
        (["X\tx"], "gene\tcondition", "names no gene of the vocabulary"),
        (["A\tx", "A\ty"], "gene\tcondition", "puts the gene A into several conditions"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(tmp_path: Path, rows: list[str], header: str, message: str) -> None:
    with pytest.raises(ScfmError, match=message):
        read_gene_condition(table(tmp_path, *rows, header=header), VOCABULARY)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScfmError, match="no such gene condition table"):
        read_gene_condition(tmp_path / "nowhere.tsv", VOCABULARY)


def test_conditions_are_trained_and_saved(tmp_path: Path) -> None:
    path = table(tmp_path, "G000\tstress", "G001\tcycle")
    model = pretrain(
        tiny_recipe(
            write_shards(tmp_path / "shards"), tmp_path / "run", data={"gene_conditions": {"pathway": str(path)}}
        )
    )
    assert read_model(model).gene_conditions == {"pathway": ["none", "cycle", "stress"]}
    # the table travels with the model: it embeds, and can be fine-tuned
    loaded = scfm.load(model)
    assert loaded.embed(made_up_cells(4)).obsm["X_scfm"].shape == (4, 16)
    quick = {"max_epochs": 1, "accelerator": "cpu"}
    loaded.finetune(made_up_cells(60), "annotation", trainer=quick).predict(made_up_cells(4))
    assert read_weights(model)["backbone.gene_conditions.pathway.embedding.weight"].shape == (3, 16)
