"""The form of the model that an scBERT checkpoint holds: all of it from the tensors, for there is nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from scfm.checkpoints.fit import Shapes
from scfm.checkpoints.labels import named
from scfm.checkpoints.scbert.names import GENES, VALUES
from scfm.errors import ScfmError
from scfm.model.heads import HeadSpec
from scfm.recipe import ModelConfig, PerformerConfig

Kernel = Literal["exp", "relu", "gelu", "none"]
REDRAW_EVERY = 1000  # scBERT's default, which its scripts never change

# in either layout
QUERY = r"performer\.net\.(layers\.\d+\.0|blocks\.\d+\.f\.net)\.fn\.to_q\.weight"
PROJECTION = r"performer\.net\.(layers\.\d+\.0|blocks\.\d+\.f\.net)\.fn\.fast_attention\.projection_matrix"
WIDEN = r"performer\.net\.(layers\.\d+\.1|blocks\.\d+\.g\.net)\.fn\.fn\.w1\.weight"
NARROW = r"performer\.net\.(layers\.\d+\.1|blocks\.\d+\.g\.net)\.fn\.fn\.w2\.weight"
FACTOR = r"performer\.net\.(layers\.\d+\.[01]|blocks\.\d+\.[fg]\.net)\.g"


@dataclass
class Form:
    """What a checkpoint's model is.

    Attributes:
        model: sizes and kinds.
        n_bins: value bins; the rows of scBERT's value embedding but the last, which is the mask's.
        heads: what it predicts.
        notes: what a reader should know, in words.
    """

    model: ModelConfig
    n_bins: int
    heads: list[HeadSpec]
    notes: list[str] = field(default_factory=list)


def read_form(
    shapes: Shapes, labels: Sequence[str] | None, kernel: Kernel, table: str, *, headless: bool = False
) -> Form:
    """Return the form of a model.

    Args:
        shapes: of the tensors, by name.
        labels: names of the classes of a fine-tuned model.
        kernel: of the features, which no tensor tells.
        table: where the frozen gene vectors come from.
        headless: the head was left behind on purpose.

    Raises:
        ScfmError: names the size that no tensor tells, and the tensors that would.
    """
    rows, width = size(shapes, re.escape(VALUES), 2)
    inner, _ = size(shapes, QUERY, 2)
    features, head_width = size(shapes, PROJECTION, 2)
    widened, _ = size(shapes, WIDEN, 2)
    _, hidden = size(shapes, NARROW, 2)
    if inner % head_width:
        raise ScfmError(f"to_q has {inner} rows, no multiple of the {head_width} columns of projection_matrix")
    factor = next((shape for name, shape in shapes.items() if re.fullmatch(FACTOR, name)), None)
    numbers = [int(found[1]) for found in map(re.compile(r"performer\.net\.\w+\.(\d+)\.").match, shapes) if found]
    model = ModelConfig(
        name="scbert",
        width=width,
        heads=inner // head_width,
        layers=max(numbers) + 1,
        hidden=hidden,
        dropout=0.0,
        attention="full",
        cell_embedding="mean",
        gene_table=table,
        performer=PerformerConfig(
            mode="compat",
            head_width=head_width,
            features=features,
            kernel=kernel,
            scaling="norms",
            redraw_every=REDRAW_EVERY,
            norm="layer" if factor is None else "scale" if factor else "rezero",  # one number, or a scalar
            glu=widened == 2 * hidden,
            reversible=any(name.startswith("performer.net.blocks.") for name in shapes),
            tied=not headless and not any(name.startswith("to_out.") for name in shapes),
            qkv_bias=any(name.endswith(".fn.to_q.bias") for name in shapes),
        ),
    )
    form = Form(model, rows - 1, [])
    form.heads = [] if headless else heads_of(shapes, rows, labels, form.notes)
    form.notes += said_by_nothing(form, GENES in shapes)
    return form


def heads_of(shapes: Shapes, rows: int, labels: Sequence[str] | None, notes: list[str]) -> list[HeadSpec]:
    """Return the only head: of bins, or of classes where the model was fine-tuned."""
    if any(name.startswith(("to_out.conv1.", "to_out.fc")) for name in shapes):
        n, _ = size(shapes, r"to_out\.fc3\.weight", 2)
        return [HeadSpec("annotation", "genes", n, named(labels, n, "labels", "scBERT", notes))]
    if labels is not None:
        raise ScfmError("--labels: the checkpoint has no head of classes; it was not fine-tuned")
    return [HeadSpec("masked_bin", "bins", rows)]


def said_by_nothing(form: Form, has_table: bool) -> list[str]:
    """Return in words what was assumed, for no tensor tells it, and what follows."""
    notes = ["mode compat: as in scBERT, what a cell gives depends on the cells that it is packed with"]
    if form.model.performer.kernel == "exp":
        notes.append("features exp (FAVOR+) and dropout 0, as in the published model; the file does not tell them")
    if form.model.performer.tied:
        notes.append("without to_out.*, the value embedding reads the bins out (tie_embed)")
    if not has_table:
        notes.append(f"without {GENES}, all gene vectors are zeros (g2v_position_emb off): nothing tells genes apart")
    return notes


def size(shapes: Shapes, pattern: str, n: int) -> tuple[int, ...]:
    """Return the shape of the first tensor of a pattern and of n dimensions. Raises ScfmError where there is none."""
    for name, shape in shapes.items():
        if len(shape) == n and re.fullmatch(pattern, name):
            return shape
    readable = re.sub(r"\\(.)", r"\1", pattern).replace("d+", "*")
    raise ScfmError(f"no tensor is {readable}, so the sizes of the model are not known")
