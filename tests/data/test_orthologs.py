"""Orthologs: one to one, counts where they belong, and everything that is dropped said."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from cells import made_up_cells
from runs import tiny_recipe, write_shards
from scipy.sparse import csr_matrix

import scfm
from scfm.data.orthologs import Orthologs
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.errors import ScfmError
from scfm.training.run import pretrain


def human(i: int) -> str:
    return f"ENSG{i:011}"


def mouse(i: int) -> str:
    return f"ENSMUSG{i:011}"


# one to one: 1, 2, 3; two mouse genes of human 4; two human genes of mouse 6
PAIRS = [
    ("ACTB", "Actb", human(1), mouse(1)),
    ("INS", "Ins2", human(2), mouse(2)),
    ("GCG", "Gcg", human(3), mouse(3)),
    ("CYP", "Cyp1", human(4), mouse(4)),
    ("CYP", "Cyp2", human(4), mouse(5)),
    ("HLA1", "H2", human(5), mouse(6)),
    ("HLA2", "H2", human(6), mouse(6)),
]


@pytest.fixture(params=["tsv", "csv", "parquet"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    frame = pd.DataFrame(PAIRS, columns=["human", "mouse", "human_ensembl", "mouse_ensembl"])
    path = tmp_path / f"orthologs.{request.param}"
    if request.param == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, sep="," if request.param == "csv" else "\t", index=False)
    return path


def mouse_cells() -> anndata.AnnData:
    """Actb by symbol and, as a second column, by id; Gcg by id alone; three that have no one-to-one ortholog."""
    var = pd.DataFrame(index=["Actb", mouse(1), mouse(3), "Cyp1", "H2", "Xist"])
    counts = csr_matrix(np.array([[1, 2, 3, 4, 5, 5], [0, 7, 0, 1, 0, 2]], np.float32))
    return anndata.AnnData(counts, obs=pd.DataFrame(index=["a", "b"]), var=var)


def test_counts_move_to_the_ortholog_and_the_rest_is_said(table: Path) -> None:
    vocabulary = Vocabulary.from_genes([Gene.of(human(3), "GCG"), Gene.of(human(4), "CYP"), Gene.of(human(1), "ACTB")])
    cells = mouse_cells()
    translated = Orthologs.read(table).translate(cells, vocabulary)
    assert translated.var_names.tolist() == [human(1), human(3)]
    assert translated.X.toarray().tolist() == [[3, 3], [7, 0]]
    assert translated.obs_names.tolist() == ["a", "b"]
    said = dict(translated.uns["orthologs"])
    assert said.pop("share_of_values_kept") == pytest.approx(13 / 30)
    assert said == {
        "file": str(table),
        "from": "mouse",
        "to": "human",
        "genes": 6,
        "genes_with_ortholog": 3,
        "genes_kept": 3,
        "genes_summed": 1,
        "genes_dropped": 3,
    }
    assert cells.X.toarray()[0].tolist() == [1, 2, 3, 4, 5, 5]


def test_names_are_those_of_the_reference_and_raw_counts_are_read(table: Path) -> None:
    cells = mouse_cells()
    cells.raw = cells
    cells.X = np.log1p(cells.X.toarray())
    reference = anndata.AnnData(np.ones((1, 2), np.float32), var=pd.DataFrame(index=["ACTB", "TP53"]))
    translated = Orthologs.read(table).translate(cells, reference)
    assert translated.var_names.tolist() == ["ACTB"]
    assert translated.X.toarray().tolist() == [[3], [7]]


def test_either_direction(table: Path) -> None:
    cells = anndata.AnnData(np.ones((1, 2), np.float32), var=pd.DataFrame(index=["INS", "HLA1"]))
    translated = Orthologs.read(table).translate(cells, Vocabulary.from_genes([Gene.of(mouse(2), "Ins2")]))
    assert (translated.uns["orthologs"]["from"], translated.var_names.tolist()) == ("human", [mouse(2)])


def test_what_cannot_be_translated_is_told(table: Path, tmp_path: Path) -> None:
    orthologs = Orthologs.read(table)
    mice = Vocabulary.from_genes([Gene.of(mouse(1), "Actb")])
    with pytest.raises(ScfmError, match=r"not those of human; where they are of mouse already, leave the orthologs"):
        orthologs.translate(mouse_cells(), mice)
    with pytest.raises(ScfmError, match="no gene of the cells has an ortholog among the genes looked for"):
        orthologs.translate(mouse_cells(), Vocabulary.from_genes([Gene.of(human(2), "INS")]))
    with pytest.raises(ScfmError, match=r"no_table\.tsv: there is no such table"):
        Orthologs.read(tmp_path / "no_table.tsv")
    (tmp_path / "genes.tsv").write_text("human\tmouse\nA\tB\n")
    with pytest.raises(ScfmError, match=r"a column of Ensembl ids for each of two organisms.*has human, mouse"):
        Orthologs.read(tmp_path / "genes.tsv")


def test_a_model_reads_cells_of_another_organism(tmp_path: Path) -> None:
    """The same counts under mouse names give the same embedding as under the model's own."""
    model = scfm.load(pretrain(tiny_recipe(write_shards(tmp_path / "shards", 40), tmp_path / "run")))
    cells = made_up_cells(12, seed=3)
    names = list(cells.var_names)
    frame = pd.DataFrame({"human": names, "mouse": [n.lower() for n in names]})
    for organism, of_gene in (("human", human), ("mouse", mouse)):
        frame[f"{organism}_ensembl"] = [of_gene(i) for i in range(len(names))]
    frame.to_csv(tmp_path / "orthologs.tsv", sep="\t", index=False)
    mice = made_up_cells(12, seed=3)
    mice.var_names = [name.lower() for name in names]
    with pytest.raises(ScfmError, match="none of its 60 genes is in the vocabulary"):
        model.embed(mice)
    model.embed(mice, orthologs=Orthologs.read(tmp_path / "orthologs.tsv"))
    assert np.array_equal(mice.obsm["X_scfm"], model.embed(cells).obsm["X_scfm"])
    assert mice.uns["scfm"]["orthologs"]["genes_kept"] == 60
    assert mice.var_names[0] == names[0].lower()


@pytest.mark.realdata
def test_the_real_table(shared: Path) -> None:
    """Human and mouse pancreas share most of what is counted; INS has two mouse genes and is dropped."""
    orthologs = Orthologs.read(shared / "data" / "gene_vocab" / "orthologs_human_mouse.parquet")
    folder = shared / "data" / "annotation"
    mice, people = (anndata.read_h5ad(folder / f"{name}.h5ad") for name in ("baron_mouse_m1", "baron_human_d12"))
    translated = orthologs.translate(mice, people)
    said = translated.uns["orthologs"]
    assert (said["from"], said["to"], translated.n_obs) == ("mouse", "human", 822)
    assert set(translated.var_names) <= set(people.var_names)
    assert said["genes_kept"] > 9000
    assert {"GCG", "SST", "PPY"} <= set(translated.var_names)
    assert "INS" not in translated.var_names
