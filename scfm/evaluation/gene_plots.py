"""The figure of gene attention: the top genes of each cell type, beside what the other types give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scfm.evaluation.plots import FAINT, new_figure

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 5  # genes of each type: more labels could not be read
LARGEST = 90.0  # area of the largest dot, in square points


def top_gene_dots(means: Mapping[str, NDArray[np.float64]], genes: Sequence[str], table: pd.DataFrame) -> bytes:
    """Draw a dot for every type and top gene: its area is the mean score, its shade how it compares among the types.

    Args:
        means: type -> (G,) mean score of each gene in its cells.
        genes: G gene names.
        table: what `scfm.gene_attention.top_genes` returned; its first genes of each type are shown, type by type.
    """
    types = list(means)
    shown = list(dict.fromkeys(table.loc[table["rank"] <= SHOWN, "gene"]))
    scores = np.stack([means[name] for name in types])[:, [list(genes).index(gene) for gene in shown]]  # (C, shown)
    lowest, span = scores.min(0), np.ptp(scores, axis=0)
    shade = np.divide(scores - lowest, span, out=np.zeros_like(scores), where=span > 0)
    cells = table.drop_duplicates("cell_type").set_index("cell_type")["cells"]
    with new_figure(3.4 + 0.2 * len(shown), 1.8 + 0.3 * len(types)) as (figure, (axis,), drawn):
        y, x = np.indices(scores.shape)
        dots = axis.scatter(
            x.ravel(),
            y.ravel(),
            s=LARGEST * scores.ravel() / scores.max(),
            c=shade.ravel(),
            cmap="Blues",
            vmin=-0.25,  # so that the palest dot is seen on white
            vmax=1,
            lw=0,
        )
        axis.set_xticks(range(len(shown)), shown, rotation=90, fontsize=7)
        axis.set_yticks(range(len(types)), [f"{name}  ({cells[name]:,})" for name in types])
        axis.set_xlim(-0.7, len(shown) - 0.3)
        axis.set_ylim(len(types) - 0.4, -0.6)
        axis.grid()
        axis.set_title("Genes attended to more in one type than elsewhere")
        axis.set_xlabel(f"area: mean attention, at most {scores.max():.2g}", color=FAINT)
        bar = figure.colorbar(dots, ax=axis, shrink=0.8, boundaries=np.linspace(0, 1, 33))
        bar.set_ticks([0, 1], labels=["lowest type", "highest type"])
        bar.outline.set_visible(False)
    return drawn.getvalue()
