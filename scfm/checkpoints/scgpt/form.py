"""The form of the model that an scGPT checkpoint holds: from its tensors where they tell, else from its args.json."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from scfm.checkpoints.fit import Shapes
from scfm.checkpoints.labels import named
from scfm.checkpoints.scgpt.names import FLAG, GENES
from scfm.checkpoints.scgpt.parts import part_of
from scfm.errors import ScfmError
from scfm.model.heads import HeadSpec, Query
from scfm.recipe import ModelConfig

SIZES = {
    "width": ("embsize", "d_model", "layer_size"),
    "heads": ("nheads", "nhead"),
    "layers": ("nlayers",),
    "hidden": ("d_hid", "layer_size"),
    "cls_decoder's layers": ("n_layers_cls", "nlayers_cls"),
    "batches": ("num_batch_labels",),
}
POOLING: dict[str, Literal["cls", "mean", "weighted"]] = {"cls": "cls", "avg-pool": "mean", "w-pool": "weighted"}
QUERIES: dict[str, Query] = {
    "inner product": "product",
    "inner product, detach": "detached product",
    "concat query": "concat",
    "sum query": "sum",
}
PERTURBATIONS = ["none", "perturbed", "padding"]
MODALITIES = ["Protein", "RNA", "<pad>", "<cls>", "<eoc>"]


@dataclass
class Form:
    """What a checkpoint's model is.

    Attributes:
        model: sizes and kinds.
        heads: what it predicts.
        cell_conditions, gene_conditions: names behind indices, as in ModelFiles.
        conflicts: where args.json and the tensors contradict each other, in words.
        notes: what a reader should know, in words.
    """

    model: ModelConfig
    heads: list[HeadSpec]
    cell_conditions: dict[str, list[str]] = field(default_factory=dict)
    gene_conditions: dict[str, list[str]] = field(default_factory=dict)
    conflicts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class FormReader:
    """Reads a form; `conflicts` and `notes` gather on the way.

    Args:
        shapes: of the tensors, by their names in layout flash.
        args: content of args.json.
        layout: of the checkpoint.
    """

    def __init__(self, shapes: Shapes, args: Mapping[str, Any], layout: str) -> None:
        self.shapes = shapes
        self.args = args
        self.layout = layout
        self.parts = {part_of(name) for name in shapes}
        self.conflicts: list[str] = []
        self.notes: list[str] = []

    def read(self, labels: Sequence[str] | None, batches: Sequence[str] | None) -> Form:
        """Return the form; `labels` and `batches` name classes and batches, else their indices do."""
        batch_names = self.batch_names(batches)
        heads = self.heads(labels, batch_names)
        cell = {"batch": batch_names} if batch_names else {}
        gene = {}
        if "perturbation" in self.parts:
            gene["perturbation"] = PERTURBATIONS
        if "modality" in self.parts:
            rows = self.rows("mod_encoder.embedding.weight") or len(MODALITIES)
            gene["modality"] = MODALITIES if rows == len(MODALITIES) else [str(i) for i in range(rows)]
            if rows != len(MODALITIES):
                self.notes.append(f"the {rows} modalities have no names; every gene counts as modality 0")
        return Form(self.model(), heads, cell, gene, self.conflicts, self.notes)

    def model(self) -> ModelConfig:
        args, parts = self.args, self.parts
        width = self.size("width", self.dim(GENES, 1))
        heads = self.size("heads", None)
        if width % heads:
            raise ScfmError(f"args.json: {heads} heads do not divide a width of {width}")
        style = args.get("cell_emb_style", "cls")
        if style not in POOLING:
            raise ScfmError(f"args.json: cell_emb_style {style!r} is unknown; scGPT has {', '.join(POOLING)}")
        if "dropout" not in args:
            self.notes.append("args.json has no dropout; 0.2, as the published models were trained with")
        if args.get("pre_norm") and self.layout.startswith("torch"):
            self.notes.append("args.json says pre_norm, which scGPT ignores on torch's layers: the model is post-norm")
        norm = self.input_norm()
        return ModelConfig(
            width=width,
            heads=heads,
            layers=self.size("layers", self.count(r"transformer_encoder\.layers\.(\d+)\.")),
            hidden=self.size("hidden", self.rows("transformer_encoder.layers.0.linear1.weight")),
            dropout=float(args.get("dropout", 0.2)),
            norm="pre" if args.get("pre_norm") and not self.layout.startswith("torch") else "post",
            value_encoder=self.value_encoder(),
            attention="generative" if FLAG in self.shapes else "full",
            unknown_output_projection=FLAG not in self.shapes,
            cell_embedding=POOLING[style],
            cell_conditions=["batch"] if "batch_encoder" in parts else [],
            input_norm=norm,
            domain="batch" if norm == "domain" else None,
            modality="modality" if "modality" in parts else None,
        )

    def value_encoder(self) -> Literal["continuous", "category", "scaling"]:
        if "value_encoder" not in self.parts:
            return "scaling"
        kind: Literal["continuous", "category"] = "continuous"
        if "value_encoder.embedding.weight" in self.shapes:
            kind = "category"
        said = self.args.get("input_emb_style", kind)
        if said not in (kind, "scaling"):
            self.conflicts.append(f"args.json says input_emb_style {said!r}, the tensors are those of {kind!r}")
        return kind

    def input_norm(self) -> Literal["none", "batch", "domain"]:
        if "input_norm" not in self.parts:
            return "none"
        kind: Literal["batch", "domain"] = "batch"
        if any(name.startswith("dsbn.") for name in self.shapes):
            kind = "domain"
        said = self.args.get("domain_spec_batchnorm")
        if said and (said == "batchnorm") != (kind == "batch"):
            self.conflicts.append(f"args.json says domain_spec_batchnorm {said!r}, the tensors have a {kind} norm")
        return kind

    def batch_names(self, given: Sequence[str] | None) -> list[str]:
        """Return the names of the batches, none where the model has none."""
        counts = {
            "batch_encoder": self.rows("batch_encoder.embedding.weight"),
            "dsbn": self.count(r"dsbn\.bns\.(\d+)\."),
            "grad_reverse_discriminator": self.rows("grad_reverse_discriminator.out_layer.weight"),
        }
        told = {part: n for part, n in counts.items() if n}
        if not told:
            if given is not None:
                raise ScfmError("--batches: the checkpoint has no part that tells batches")
            return []
        if len(set(told.values())) > 1:
            said = ", ".join(f"{part} for {n}" for part, n in told.items())
            self.conflicts.append(f"the tensors disagree on the number of batches: {said}")
        return named(given, self.size("batches", max(told.values())), "batches", "scGPT", self.notes)

    def heads(self, labels: Sequence[str] | None, batch_names: list[str]) -> list[HeadSpec]:
        args, heads = self.args, []
        nonzero = "zero_prob" in self.parts
        if "perturbation" in self.parts:
            activation, adaptive = args.get("decoder_activation"), bool(args.get("decoder_adaptive_bias"))
            heads.append(
                HeadSpec("gep", "gep", nonzero=nonzero, affine=True, activation=activation, adaptive_bias=adaptive)
            )
        elif "decoder" in self.parts:
            heads.append(HeadSpec("gep", "gep", nonzero=nonzero))
        if "mvc_decoder" in self.parts:
            heads.append(self.gepc(nonzero))
        if "cls_decoder" in self.parts:
            n = self.rows("cls_decoder.out_layer.weight") or 1
            layers = self.size("cls_decoder's layers", self.class_layers("cls_decoder"))
            names = named(labels, n, "labels", "scGPT", self.notes) if n > 1 or labels else ["0"]
            heads.append(HeadSpec("annotation", "cls", n, names, layers=layers))
        elif labels is not None:
            raise ScfmError("--labels: the checkpoint has no cls_decoder")
        if "dab" in self.parts:
            layers = self.class_layers("grad_reverse_discriminator")
            heads.append(HeadSpec("dar", "domain", len(batch_names), batch_names, layers=layers))
        return heads

    def gepc(self, nonzero: bool) -> HeadSpec:
        style = self.args.get("mvc_decoder_style", "inner product")
        if style not in QUERIES:
            raise ScfmError(f"args.json: mvc_decoder_style {style!r} is unknown; scGPT has {', '.join(QUERIES)}")
        query, found = QUERIES[style], self.query()
        if found is not None and found != query.removeprefix("detached "):
            self.conflicts.append(f"args.json says mvc_decoder_style {style!r}, the tensors are those of {found!r}")
            query = found
        width, read = self.dim(GENES, 1), self.dim("mvc_decoder.gene2query.weight", 1)
        nonzero = nonzero and query.endswith("product")  # the other queries have no zero probability
        return HeadSpec("gepc", "gepc", nonzero=nonzero, query=query, query_reads_conditions=read == 2 * (width or 0))

    def query(self) -> Query | None:
        """Return the kind of query that the tensors show, if they do; `product` also stands for a detached one."""
        if "mvc_decoder.W.weight" in self.shapes:
            return "product"
        hidden = self.dim("mvc_decoder.fc1.weight", 1)
        if hidden is None:
            return None
        return "sum" if hidden == self.rows("mvc_decoder.gene2query.weight") else "concat"

    def class_layers(self, part: str) -> int:
        return (self.count(rf"{part}\._decoder\.(\d+)\.") + 2) // 3 + 1

    def size(self, what: str, told: int | None) -> int:
        """Return a size, from the tensors where they tell it; a contradicting args.json is noted as a conflict."""
        key = next((key for key in SIZES[what] if self.args.get(key) is not None), None)
        said = None if key is None else self.args[key]
        if said is not None and not isinstance(said, int):
            raise ScfmError(f"args.json: {key} is {said!r}; expected a whole number")
        if told and said is not None and told != said:
            self.conflicts.append(f"args.json says {key} {said}, the tensors {told}")
        if not told and said is None:
            raise ScfmError(f"args.json has no {' or '.join(SIZES[what])}, and the tensors do not tell the {what}")
        return told or int(said)  # type: ignore[arg-type]

    def rows(self, name: str) -> int | None:
        return self.dim(name, 0)

    def dim(self, name: str, axis: int) -> int | None:
        shape = self.shapes.get(name, ())
        return shape[axis] if len(shape) > axis else None

    def count(self, pattern: str) -> int:
        """Return one more than the largest number that stands in names of a pattern."""
        found = [int(match[1]) for match in map(re.compile(pattern).match, self.shapes) if match]
        return max(found, default=-1) + 1
