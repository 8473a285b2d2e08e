"""Embed a data set of Open Problems' batch integration task with a pretrained model of scfm."""

import sys

import anndata as ad

import scfm

## VIASH START
par = {
    "input": "resources_test/task_batch_integration/cxg_immune_cell_atlas/dataset.h5ad",
    "model": "model",
    "output": "output.h5ad",
}
meta = {"name": "scfm"}
## VIASH END

NOT_APPLICABLE = 99  # how a component says that a method cannot be used with a data set

print(">> Read input", flush=True)
dataset = ad.read_h5ad(par["input"])

print(">> Embed", flush=True)
cells = ad.AnnData(dataset.layers["counts"], obs=dataset.obs[["batch"]], var=dataset.var)
model = scfm.load(par["model"])
report = scfm.check(cells, model=model)
if not report.ok:
    print(f"NON-APPLICABLE ERROR: {'; '.join(report.problems)}", flush=True)
    sys.exit(NOT_APPLICABLE)
model.embed(cells)

print(">> Write output", flush=True)
output = ad.AnnData(
    obs=dataset.obs[[]],
    var=dataset.var[[]],
    obsm={"X_emb": cells.obsm["X_scfm"]},
    uns={
        "dataset_id": dataset.uns["dataset_id"],
        "normalization_id": dataset.uns["normalization_id"],
        "method_id": meta["name"],
    },
)
output.write_h5ad(par["output"], compression="gzip")
