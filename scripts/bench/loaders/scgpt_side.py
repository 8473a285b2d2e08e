"""scGPT 0.2.4's pretraining pipeline: rows of a Hugging Face data set as torch tensors, through its DataCollator.

scgpt_side.py build FOLDER | tokens FOLDER SOURCE WORKERS CELLS

SOURCE is scGPT's own code, unpacked. Of it two files are used, without the rest of the package, which does not install
beside a current torch. The recipe is that of its pretraining script: `<cls>` first in every row, sampling to 1,200
tokens, 51 bins in the collator, masking by probability 0.4, DataLoader with shuffling.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from measured import measure

CLS_VALUE, PAD_VALUE, LENGTH, BATCH = -2, -2, 1200, 64


def build(folder: Path) -> None:
    """Write what its scBank writes: lists of int64 ids and float32 counts, `<cls>` in front."""
    import anndata
    import pyarrow as pa
    from datasets import Dataset, concatenate_datasets

    started, parts = time.process_time(), []
    for path in sorted(folder.glob("cells-*.h5ad")):
        matrix = anndata.read_h5ad(path).X.tocsr()
        n, n_genes = matrix.shape
        ends = matrix.indptr[1:].astype(np.int64)
        genes = np.insert(matrix.indices.astype(np.int64), matrix.indptr[:-1], n_genes + 1)
        counts = np.insert(matrix.data.astype(np.float32), matrix.indptr[:-1], CLS_VALUE)
        offsets = pa.array(np.concatenate([[0], ends + np.arange(1, n + 1)]).astype(np.int32))
        table = pa.table(
            {
                "id": pa.array(np.arange(n)),
                "genes": pa.ListArray.from_arrays(offsets, pa.array(genes)),
                "expressions": pa.ListArray.from_arrays(offsets, pa.array(counts)),
            }
        )
        parts.append(Dataset(table))
    concatenate_datasets(parts).save_to_disk(str(folder / "scgpt"))
    print(json.dumps({"cpu": time.process_time() - started}))


def tokens(folder: Path, source: Path, workers: int, cells: int) -> None:
    """Deliver its padded, binned and masked batches of 64."""
    import datasets
    import torch

    torch.set_num_threads(1)
    package = types.ModuleType("scgpt")
    package.__path__ = [str(source / "scgpt")]  # its __init__ imports torchtext
    package.logger = logging.getLogger("scgpt")
    sys.modules["scgpt"] = package
    collator = importlib.import_module("scgpt.data_collator").DataCollator(
        do_padding=True, pad_token_id=20_000, pad_value=PAD_VALUE, do_mlm=True, do_binning=True,
        mlm_probability=0.4, mask_value=-1, max_length=LENGTH, sampling=True, keep_first_n_tokens=1,
    )  # fmt: skip

    def open_loader() -> Iterator[int]:
        data = datasets.load_from_disk(str(folder / "scgpt")).with_format("torch")
        torch.manual_seed(0)
        loader = torch.utils.data.DataLoader(
            data, batch_size=BATCH, shuffle=True, collate_fn=collator, drop_last=True, num_workers=workers
        )
        return (len(batch["gene"]) for batch in loader)

    measure(open_loader, cells, ["torch", "datasets", "numpy"])


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build(Path(sys.argv[2]))
    else:
        tokens(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
