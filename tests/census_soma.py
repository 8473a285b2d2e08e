"""A SOMA with the layout of the CELLxGENE Census, written on the disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma as soma
from scipy.sparse import csr_matrix

N_CELLS, N_GENES = 240, 40
ABOUT = {"census_schema_version": "2.4.0", "census_build_date": "2025-11-08", "dataset_schema_version": "7.0.0"}


def census_counts() -> csr_matrix:
    """(240, 40) counts."""
    return csr_matrix(np.random.default_rng(0).poisson(0.8, (N_CELLS, N_GENES)).astype(np.float32))


def census_obs() -> pd.DataFrame:
    """Three data sets, one after the other; every fifth cell is secondary, every third from the liver."""
    number = np.arange(N_CELLS)
    counts = census_counts()
    return pd.DataFrame(
        {
            "dataset_id": pd.Categorical([f"ds-{i * 3 // N_CELLS}" for i in number]),
            "assay_ontology_term_id": pd.Categorical(
                np.where(number % 4 == 0, "EFO:0008931", "EFO:0009922"), ["EFO:0008931", "EFO:0009922", "EFO:0010550"]
            ),
            "tissue": pd.Categorical(np.where(number % 3 == 0, "liver", "lung")),
            "donor_id": pd.Categorical([f"d{i % 7}" for i in number]),
            "is_primary_data": number % 5 != 0,
            "nnz": counts.getnnz(axis=1).astype(np.int64),
            "raw_sum": np.asarray(counts.sum(1)).ravel().astype(np.float64),
        }
    )


def write_census(root: Path, organism: str = "homo_sapiens") -> Path:
    """Write the SOMA; return its place."""
    var = pd.DataFrame(
        {
            "feature_id": [f"ENSG{i:011d}" for i in range(N_GENES)],
            "feature_name": [f"G{i}" for i in range(N_GENES)],
            "feature_type": ["protein_coding"] * N_GENES,
        }
    )
    datasets = pd.DataFrame(
        {
            "dataset_id": [f"ds-{i}" for i in range(4)],
            "dataset_version_id": [f"version-{i}" for i in range(4)],
            "dataset_title": [f"title {i}" for i in range(4)],
            "citation": [f"Publication {i}" for i in range(4)],
        }
    )
    pending: list[tuple[str, pa.Table]] = []
    with soma.Collection.create(str(root)) as census:
        info = census.add_new_collection("census_info")
        _add(info, "summary", pd.DataFrame({"label": list(ABOUT), "value": list(ABOUT.values())}), pending)
        _add(info, "datasets", datasets, pending)
        experiment = census.add_new_collection("census_data").add_new_collection(organism, soma.Experiment)
        _add(experiment, "obs", census_obs(), pending)
        rna = experiment.add_new_collection("ms").add_new_collection("RNA", soma.Measurement)
        _add(rna, "var", var, pending)
        raw = rna.add_new_collection("X").add_new_sparse_ndarray("raw", type=pa.float32(), shape=(N_CELLS, N_GENES))
        with raw:
            raw.write(pa.SparseCOOTensor.from_scipy(census_counts().tocoo()))
    # Through the handle that created it, tiledbsoma 2.3 writes categories at the very time of creation: they are lost.
    for uri, table in pending:
        with soma.DataFrame.open(uri, "w") as frame:
            frame.write(table)
    return root


def _add(collection: soma.Collection, name: str, frame: pd.DataFrame, pending: list[tuple[str, pa.Table]]) -> None:
    numbered = frame.assign(soma_joinid=np.arange(len(frame), dtype=np.int64))
    table = pa.Table.from_pandas(numbered, preserve_index=False)
    fields = []
    for field in table.schema:
        if pa.types.is_string(field.type):
            field = pa.field(field.name, pa.large_string())
        elif pa.types.is_dictionary(field.type):
            field = pa.field(field.name, pa.dictionary(pa.int32(), pa.large_string()))
        fields.append(field)
    schema = pa.schema(fields)
    collection.add_new_dataframe(name, schema=schema, index_column_names=["soma_joinid"], domain=[(0, len(frame) - 1)])
    pending.append((collection[name].uri, table.cast(schema)))
