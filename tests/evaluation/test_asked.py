"""From files and options to cells and splits."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
from cells import GENES, made_up_cells
from scipy.sparse import csr_matrix

from scfm.data.genes import genes_of
from scfm.errors import ScfmError
from scfm.evaluation.asked import donor_column, frozen_splits, read_cells, splits_of, together
from scfm.evaluation.protocol import LabelledCells
from scfm.evaluation.protocols.annotation import Annotation
from scfm.evaluation.splits import save_splits


def cells() -> LabelledCells:
    adata = made_up_cells(90)
    adata.obs["donor_id"] = [f"d{k % 5}" for k in range(90)]
    adata.obs["plate"] = np.arange(90) % 3
    return LabelledCells(adata, "cell_type", "batch", "donor_id")


@pytest.mark.parametrize(("split", "column"), [("donor", "donor_id"), ("batch", "batch"), ("plate", "plate")])
def test_whole_groups_are_held_out(split: str, column: str) -> None:
    asked = cells()
    groups = asked.adata.obs[column].astype(str).to_numpy()
    splits = splits_of(Annotation(), asked, split, (), 3)
    assert [one.seed for one in splits] == [0, 1, 2]
    for one in splits:
        assert not set(groups[one.train]) & set(groups[one.test])
        assert column in one.protocol


def test_named_groups_are_held_out_in_every_seed() -> None:
    asked = cells()
    splits = splits_of(Annotation(), asked, "donor", ["d1", "d4"], 2)
    donors = asked.adata.obs["donor_id"].to_numpy()
    assert [set(donors[one.test]) for one in splits] == [{"d1", "d4"}] * 2


def test_what_cannot_be_split_is_said() -> None:
    asked = cells()
    with pytest.raises(
        ScfmError, match=r"--split study: there is no obs column study or dataset_id; there is cell_type"
    ):
        splits_of(Annotation(), asked, "study", (), 1)
    with pytest.raises(ScfmError, match="--held-out: names groups; say of which column"):
        splits_of(Annotation(), asked, "random", ["d1"], 1)


def test_several_files_are_put_together_on_the_genes_they_share(tmp_path: Path) -> None:
    made_up_cells(30, seed=0).write_h5ad(tmp_path / "one.h5ad")
    made_up_cells(20, seed=1, genes=GENES[:50]).write_h5ad(tmp_path / "two.h5ad")
    files = [str(tmp_path / f"{name}.h5ad") for name in ("one", "two")]
    both = read_cells(files, "cell_type")
    assert both.shape == (50, 50)
    assert both.obs["file"].value_counts().to_dict() == {"one": 30, "two": 20}
    assert both.obs_names.is_unique
    with pytest.raises(ScfmError, match="several files are called one"):
        read_cells([files[0], files[0]], "cell_type")


def named(names: list[str], ids: list[str | None] | None, seed: int = 0) -> anndata.AnnData:
    """Ten cells, of each gene as many counts as its place, with Ensembl ids where given."""
    cells = made_up_cells(10, seed=seed, genes=names)
    cells.X = csr_matrix(np.tile(np.arange(len(names)) + 1.0, (10, 1)).astype(np.float32))
    if ids is not None:
        cells.var["gene_ids"] = ids
    return cells


def test_genes_of_several_files_are_the_same_by_ensembl_id() -> None:
    """The symbol of gene 1 was changed; MATR3 is two genes; NOC2L has its id in one file only, FAM5 in none."""
    first = named(
        ["QARS", "MATR3", "MATR3-1", "NOC2L", "FAM5", "HBB"],
        ["ENSG00000000001.3", "ENSG00000000002", "ENSG00000000003", None, None, "ENSG00000000005"],
    )
    second = named(
        ["FAM5", "NOC2L", "MATR3", "QARS1", "HBB"],
        [None, "ENSG00000000004", "ENSG00000000003", "ENSG00000000001", "ENSG00000000006"],
        seed=1,
    )
    both = together({"one": first, "two": second})
    assert both.var_names.tolist() == ["QARS", "MATR3-1", "NOC2L", "FAM5"]
    ids = ["ENSG00000000001", "ENSG00000000003", "ENSG00000000004", None]
    assert genes_of(both.var) == (ids, both.var_names.tolist())
    rows = both.to_df().groupby(both.obs_names.str[-3:]).first().to_numpy().tolist()
    assert rows == [[1, 3, 4, 5], [4, 3, 2, 1]]


def test_ids_beside_raw_counts_are_kept() -> None:
    cells = named(["QARS", "HBB"], ["ENSG00000000001", "ENSG00000000005"])
    cells.raw = anndata.AnnData(cells.X, obs=cells.obs, var=cells.var[[]])
    both = together({"one": cells, "two": named(["HBB"], ["ENSG00000000005"], seed=1)})
    assert genes_of(both.var) == (["ENSG00000000005"], ["HBB"])
    with pytest.raises(ScfmError, match="one, two share no gene, by Ensembl id or by symbol"):
        together({"one": cells, "two": named(["CD4"], None, seed=1)})


def test_donors_are_found_where_there_are_several() -> None:
    adata = cells().adata
    assert donor_column(adata, None) == "donor_id"
    assert donor_column(adata, "batch") == "batch"
    adata.obs["donor_id"] = "d1"
    assert donor_column(adata, None) is None
    with pytest.raises(ScfmError, match="--donor: there is no obs column 'patient'"):
        donor_column(adata, "patient")


def test_frozen_splits_come_back(tmp_path: Path) -> None:
    asked = cells()
    splits = splits_of(Annotation(), asked, "donor", (), 2)
    names = asked.adata.obs_names.tolist()
    save_splits(tmp_path / "splits.json", splits, names)
    again = frozen_splits(str(tmp_path / "splits.json"), asked.adata)
    assert [one.hash(names) for one in again] == [one.hash(names) for one in splits]
    with pytest.raises(ScfmError, match="there is no such file"):
        frozen_splits(str(tmp_path / "other.json"), asked.adata)
