"""Gene attention: how much the genes of a cell are read by all others, and which genes that sets a cell type apart by.

The score of a gene is the mean of its column in the attention matrix, over the layers and heads of a model (scBERT's
interpretation: Yang et al., Nat Mach Intell 2022). Mixers give it without that matrix: for features phi it is
phi(k_j) . mean_i phi(q_i) / (phi(q_i) . z). The scores of a cell sum to 1 over its tokens; 1 / tokens is what a gene
gets that is read like all others.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scfm.data.batch import PackedBatch
from scfm.data.genes import genes_of
from scfm.errors import ScfmError
from scfm.model.performer import Mixer

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from scfm.data.gene_table import GeneTable
    from scfm.data.vocabulary import Vocabulary

LAYER = "gene_attention"
TOP_GENES = 10


class GeneAttention:
    """Takes the scores of the cells that a network reads while this is open (`with GeneAttention(network, ...)`).

    Args:
        network: a model whose blocks mix genes with a `Mixer`.
        source: what messages call the model.

    Raises ScfmError for a model without mixers.
    """

    def __init__(self, network: nn.Module, source: str) -> None:
        self.mixers = [module for module in network.modules() if isinstance(module, Mixer)]
        if not self.mixers:
            raise ScfmError(
                f"{source}: tells no gene attention; only the mixers of scBERT's blocks tell it without a matrix of "
                "all pairs of genes"
            )
        self.of_pack: list[Tensor] = []
        self.parts: list[tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]] = []

    def __enter__(self) -> Self:
        self.hooks = [mixer.register_forward_hook(self.add) for mixer in self.mixers]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def add(self, mixer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Take what one layer says of the pack that it mixes."""
        assert isinstance(mixer, Mixer)
        qkv, segments = inputs[:2]
        self.of_pack.append(mixer.gene_scores(qkv, segments))

    def take(self, pack: PackedBatch) -> None:
        """Keep the scores of a pack, once the network has read it."""
        scores = torch.stack(self.of_pack).mean(0).float().cpu().numpy()  # (T,)
        self.of_pack.clear()
        cells = pack.cell_id[pack.cell_of_token].cpu().numpy()
        real = cells >= 0
        self.parts.append((cells[real], pack.genes.cpu().numpy()[real], scores[real]))

    def matrix(self, n_cells: int, vocabulary: Vocabulary) -> csr_matrix:
        """Return the scores, (n_cells, n_genes) float32 by vocabulary id; genes without a token are not stored."""
        from scipy.sparse import csr_matrix

        cells, genes, scores = (np.concatenate(part) for part in zip(*self.parts, strict=True))
        is_gene = genes < vocabulary.n_genes
        at = cells[is_gene], genes[is_gene]
        return csr_matrix((scores[is_gene], at), shape=(n_cells, vocabulary.n_genes))

    def write(self, adata: AnnData, vocabulary: Vocabulary, table: GeneTable | None) -> None:
        """Write `.layers["gene_attention"]`: cells x genes of `adata`, float32 CSR; nothing for genes it lacks."""
        from scipy.sparse import csr_matrix

        entries = vocabulary.match(*genes_of(adata.var), table)  # (n_vars,)
        known = np.flatnonzero((entries >= 0) & (entries < vocabulary.n_genes))
        found = self.matrix(adata.n_obs, vocabulary)[:, entries[known]].tocoo()
        adata.layers[LAYER] = csr_matrix((found.data, (found.row, known[found.col])), shape=adata.shape)


def top_genes(adata: AnnData, label: str, n: int = TOP_GENES) -> pd.DataFrame:
    """Return the genes that the cells of each type attend to more than all other cells do.

    Genes are ranked by the difference of the two means, because the genes that every cell attends to most are much the
    same in all types. Columns: cell_type, cells, rank, gene, score, elsewhere (mean scores), difference.

    Args:
        adata: cells with `.layers["gene_attention"]`.
        label: obs column that tells the types.
        n: genes of each type.

    Raises ScfmError where all cells are of one type.
    """
    import pandas as pd

    types = adata.obs[label].astype(str).to_numpy(dtype=str)
    listed, code = np.unique(types, return_inverse=True)
    names = listed.tolist()
    if len(names) < 2:
        raise ScfmError(f"all cells are of {label} {names[0]!r}: there is no other type to compare gene attention with")
    means = np.stack([mean_scores(adata, code == k) for k in range(len(names))])  # (C, G)
    cells = np.bincount(code)
    rows = []
    for k, name in enumerate(names):
        others = np.delete(np.arange(len(names)), k)
        elsewhere = np.average(means[others], axis=0, weights=cells[others])
        difference = means[k] - elsewhere
        for rank, gene in enumerate(np.argsort(-difference, kind="stable")[:n], start=1):
            values = (means[k, gene], elsewhere[gene], difference[gene])
            rows.append((name, cells[k], rank, adata.var_names[gene], *map(float, values)))
    return pd.DataFrame(rows, columns=["cell_type", "cells", "rank", "gene", "score", "elsewhere", "difference"])


def mean_scores(adata: AnnData, cells: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the mean score of each gene over some cells, (G,)."""
    return np.asarray(adata.layers[LAYER][cells].mean(axis=0), dtype=np.float64).ravel()


def write_top_genes(adata: AnnData, label: str, folder: Path) -> Path:
    """Write `<label>_top_genes.csv` and its plot into a folder; return the plot. Raises ScfmError as `top_genes`."""
    from scfm.evaluation.gene_plots import top_gene_dots

    table = top_genes(adata, label)
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{label}_top_genes.csv", index=False)
    types = adata.obs[label].astype(str).to_numpy(dtype=str)
    means = {name: mean_scores(adata, types == name) for name in dict.fromkeys(table["cell_type"])}
    shown = list(dict.fromkeys(table["gene"]))
    places = [list(adata.var_names).index(gene) for gene in shown]
    plot = folder / f"{label}_top_genes.png"
    plot.write_bytes(top_gene_dots({name: mean[places] for name, mean in means.items()}, shown, table))
    return plot
