"""What scGPT cannot hold of a native model, and what it holds but computes in another way."""

from __future__ import annotations

from collections import Counter

from scfm.checkpoints.native import ModelFiles
from scfm.checkpoints.scgpt.form import PERTURBATIONS
from scfm.errors import ScfmError
from scfm.model.heads import HeadSpec

PERTURBATION = "perturbation"
DISCRIMINATOR_LAYERS = 3  # fixed in scGPT


def scgpt_class(files: ModelFiles) -> str:
    """Return the class of scGPT's that holds a model of this form."""
    if PERTURBATION in files.gene_conditions or any(head.affine for head in files.heads):
        return "TransformerGenerator"
    multiomic = files.model.modality or any(head.query_reads_conditions for head in files.heads)
    return "MultiOmicTransformerModel" if multiomic else "TransformerModel"


def check(files: ModelFiles) -> None:
    """Raise ScfmError that lists all that scGPT has no place for, with the option that drops it where one exists."""
    if files.model.name != "scgpt":
        raise ScfmError(f"a model of the kind {files.model.name} is none of scGPT's")
    kind = scgpt_class(files)
    wrong = wrong_model(files, kind)
    for head in files.heads:
        wrong += [
            f"{reason}; --drop 'heads.{head.task}.*' leaves it behind" for reason in wrong_head(head, files, kind)
        ]
    for kind_of_head, n in Counter(head.kind for head in files.heads).items():
        if n > 1:
            tasks = " or ".join(f"'heads.{head.task}.*'" for head in files.heads if head.kind == kind_of_head)
            wrong.append(f"{n} heads of kind {kind_of_head}, where scGPT has one; --drop {tasks}")
    gep, gepc = (next((head for head in files.heads if head.kind == kind), None) for kind in ("gep", "gepc"))
    if gep and gepc and gepc.query.endswith("product") and gep.nonzero != gepc.nonzero:
        wrong.append("one of gep and gepc has zero probabilities, where scGPT gives them to both or none")
    if wrong:
        raise ScfmError("scGPT cannot hold this model:\n  " + "\n  ".join(wrong))


def wrong_model(files: ModelFiles, kind: str) -> list[str]:
    model = files.model
    conditions = dict.fromkeys([*model.cell_conditions, *([model.domain] if model.domain else [])])
    others = [name for name in files.gene_conditions if name not in (model.modality, PERTURBATION)]
    wrong = []
    if files.tokens.values == "log2":
        wrong.append("data.values log2: scGPT bins values by their quantiles")
    if model.activation != "relu":
        wrong.append(f"model.activation {model.activation}: scGPT has relu")
    if len(conditions) > 1:
        wrong.append(f"the cell conditions {', '.join(conditions)}: scGPT has one, the batch")
    if others:
        wrong.append(f"the gene conditions {', '.join(others)}: scGPT has perturbation and modality")
    if PERTURBATION in files.gene_conditions and len(files.gene_conditions[PERTURBATION]) != len(PERTURBATIONS):
        wrong.append(f"the gene condition perturbation: scGPT's has {', '.join(PERTURBATIONS)}")
    if kind == "TransformerGenerator":
        parts = {
            "no gene condition perturbation": PERTURBATION not in files.gene_conditions,
            "a cell condition": bool(conditions),
            "a modality": model.modality is not None,
            "an input norm": model.input_norm != "none",
            f"the value encoder {model.value_encoder}": model.value_encoder != "continuous",
            "generative attention": model.attention == "generative",
        }
        wrong += [f"{part}: scGPT's perturbation model cannot have that" for part, has in parts.items() if has]
    return wrong


def wrong_head(head: HeadSpec, files: ModelFiles, kind: str) -> list[str]:
    reasons = []
    if head.kind == "neighbours":
        reasons.append(f"head {head.task} is a vote of reference cells, which scGPT has no place for")
    if head.kind in ("gep", "gepc") and head.n_out > 1:
        reasons.append(f"head {head.task} predicts bins by cross-entropy, where scGPT predicts a value")
    if kind == "TransformerGenerator" and head.kind == "gep" and not head.affine:
        reasons.append(f"head {head.task} is not affine, as in scGPT's perturbation model")
    if kind == "TransformerGenerator" and head.kind == "domain":
        reasons.append(f"head {head.task} tells domains, which scGPT's perturbation model cannot")
    multiomic = kind == "MultiOmicTransformerModel" and (files.model.modality or files.model.cell_conditions)
    if head.kind == "gepc" and multiomic and not head.query_reads_conditions:
        reasons.append(f"head {head.task} reads no conditions in its query, as scGPT's multi-omic model does")
    joined = kind == "TransformerModel" and files.model.cell_conditions
    if head.kind == "gepc" and not head.query.endswith("product") and joined:
        reasons.append(f"head {head.task} has a {head.query} query and conditions, where scGPT's takes none")
    if head.kind == "domain" and head.layers != DISCRIMINATOR_LAYERS:
        reasons.append(f"head {head.task} has {head.layers} layers, where scGPT has {DISCRIMINATOR_LAYERS}")
    domains = {len(files.cell_conditions[name]) for name in [*files.model.cell_conditions, files.model.domain] if name}
    if head.kind == "domain" and domains and domains != {head.n_out}:
        reasons.append(f"head {head.task} tells {head.n_out} domains, where scGPT tells the {max(domains)} batches")
    return reasons


def notes(files: ModelFiles) -> list[str]:
    """Return in words what scGPT 0.2.4 computes in another way than scfm."""
    model, kind = files.model, scgpt_class(files)
    said = []
    if kind != "TransformerModel":
        said.append(f"the model is one for scgpt.model.{kind}")
    if kind == "MultiOmicTransformerModel":
        said.append(
            "without flash-attn, scGPT's load_pretrained skips this model's attention weights in silence, unless you "
            "set model.use_fast_transformer = False before"
        )
    if model.attention == "generative":
        said.append("scGPT 0.2.4 attends in full: unknown genes act on known ones; its branch dev-temp is generative")
        if model.unknown_output_projection:
            said.append("scGPT's generative code skips the output projection of unknown genes, this model uses it")
    if model.norm == "pre":
        said.append("pre-norm is ignored by scGPT where flash-attn is not installed: outputs then differ")
    if model.input_norm == "domain":
        said.append("scGPT norms a whole batch by the domain of its first cell: give it batches of one domain")
    if files.genes_read is not None:
        said.append(
            f"it reads {len(files.genes_read)} genes (genes_read in its config.json): give scGPT these columns only"
        )
    if model.cell_embedding != "cls":
        said.append("scGPT counts padding in mean and weighted cell embeddings: cells of unequal length differ")
    if model.value_encoder == "category":
        said.append("<cls> has a value embedding of its own here, which scGPT reads at the value n_bins")
    for head in files.heads:
        if head.kind == "gepc" and not head.query.endswith("product"):
            said.append(f"scGPT's models crash with MVC=True and a {head.query} query; the decoder alone works")
    if not any(head.kind == "gep" for head in files.heads):
        said.append("there is no gep head: scGPT builds a decoder all the same, with random weights")
    return said
