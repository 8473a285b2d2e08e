"""The Python door: a trained model that takes AnnData and gives AnnData."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from scfm.checkpoints.hub import model_folder, push_folder
from scfm.checkpoints.native import ModelFiles, as_plain, load_model, save_model
from scfm.data.batch import PackedBatch
from scfm.data.hashing import store_hashes
from scfm.data.loader import PackLoader
from scfm.data.order import CellOrder
from scfm.data.store import CellStore, Codes
from scfm.errors import ScfmError
from scfm.gene_attention import GeneAttention
from scfm.model.heads import HeadSpec
from scfm.model.novelty import UNASSIGNED, novelty
from scfm.model.precision import Precision, at_precision
from scfm.version import __version__

if TYPE_CHECKING:
    from anndata import AnnData

    from scfm.data.gene_table import GeneTable
    from scfm.data.orthologs import Orthologs

EMBEDDING = "X_scfm"
CELLS_PER_BATCH = 256


class PretrainedModel:
    """A network with its vocabulary, tokenisation and labels.

    Args:
        network: weights in place.
        files: what gives the numbers a meaning.
        source: the directory it came from, written into provenance.
    """

    def __init__(self, network: nn.Module, files: ModelFiles, source: str) -> None:
        self.network = network.eval()
        self.files = files
        self.source = source
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def embed(
        self,
        adata: AnnData,
        *,
        tokens_per_pack: int = 16384,
        accept_normalised: bool = False,
        genes: GeneTable | None = None,
        orthologs: Orthologs | None = None,
        precision: Precision = "fp32",
    ) -> AnnData:
        """Write the L2-normalised cell embedding into `adata.obsm["X_scfm"]` and return `adata`.

        The same cell gives the same embedding alone, in any batch, order or chunk size; `adata.X` is not touched.

        Args:
            adata: raw counts in `raw.X`, else `X` (normalised values where the model was trained on such).
            tokens_per_pack: most tokens in one forward pass; bounds the memory.
            accept_normalised: take values that are not counts; bins keep only their order within a cell.
            genes: table by which more names are matched, `GeneTable.read(["hgnc_complete_set.tsv"])`.
            orthologs: for cells of another organism, `Orthologs.read("orthologs.parquet")`: their counts are read as
                those of the model's genes, one to one.
            precision: `bf16` is faster where the device has bf16 instructions, and close to `fp32`, not equal.

        Raises:
            ScfmError: the values are not what the model expects, no gene matches its vocabulary, or the device has no
                bf16 instructions.
        """
        network = self.network_at(precision)
        read = orthologs.translate(adata, self.files.vocabulary) if orthologs else adata
        store = self.store(read, accept_normalised, genes)
        conditions = self.conditions_of(adata)
        embeddings = np.empty((store.n_cells, self.files.model.width), np.float32)
        for pack, output in self.outputs(network, store, conditions, tokens_per_pack):
            real = pack.real_cells.cpu().numpy()
            cells = torch.nn.functional.normalize(output.cell.float(), dim=-1).cpu().numpy()  # (N, D)
            embeddings[pack.cell_id.cpu().numpy()[real]] = cells[real]
        adata.obsm[EMBEDDING] = embeddings
        adata.uns["scfm"] = self.provenance(read, store, conditions, genes, precision)
        return adata

    def predict(
        self,
        adata: AnnData,
        *,
        tokens_per_pack: int = 16384,
        accept_normalised: bool = False,
        genes: GeneTable | None = None,
        orthologs: Orthologs | None = None,
        precision: Precision = "fp32",
        unassigned_below: float | None = None,
        gene_attention: bool = False,
    ) -> AnnData:
        """Write predicted labels and their probabilities, and return `adata`.

        For a head named `annotation`: `.obs["annotation"]`, `.obs["annotation_probability"]`, and all probabilities in
        `.obsm["annotation_probabilities"]`, columns in the order of `.uns["scfm"]["labels"]["annotation"]`. A head that
        knows novel types labels them `Unassigned`, and writes how novel a cell is into `.obs["annotation_novelty"]`.
        With `gene_attention`, `.layers["gene_attention"]` (cells, genes of `adata`) says how much each gene is read by
        the others of its cell (see `scfm.gene_attention`).

        Args:
            adata: as for `embed`.
            tokens_per_pack: most tokens in one forward pass.
            accept_normalised: as for `embed`.
            genes: as for `embed`.
            orthologs: as for `embed`.
            precision: as for `embed`.
            unassigned_below: cells whose largest probability is lower are labelled `Unassigned` (scBERT's rule for
                novel types, with 0.5), in place of a head's own rule (`task.novel_types`); 0 labels every cell.
                Probabilities stay as they are.
            gene_attention: whether to write how much each gene is attended to; only mixers, those of scBERT, tell.

        Raises:
            ScfmError: the model has no head that predicts labels, or tells no gene attention; the threshold is no
                probability; or as for `embed`.
        """
        if unassigned_below is not None and not 0 <= unassigned_below <= 1:
            raise ScfmError(f"unassigned_below: {unassigned_below} is not a probability; it lies between 0 and 1")
        if gene_attention and orthologs is not None:
            raise ScfmError(
                "gene_attention: names the genes of the cells, and orthologs are named as the model's; translate the "
                "cells first: orthologs.translate(adata, model.files.vocabulary)"
            )
        network = self.network_at(precision)
        heads = [head for head in self.files.heads if head.tells_classes]
        if not heads:
            raise ScfmError(f"{self.source}: has no head that predicts labels; `scfm finetune` adds one")
        read = orthologs.translate(adata, self.files.vocabulary) if orthologs else adata
        store = self.store(read, accept_normalised, genes)
        conditions = self.conditions_of(adata)
        logits = {head.task: np.empty((store.n_cells, head.n_out), np.float32) for head in heads}
        with GeneAttention(network, self.source) if gene_attention else nullcontext() as attention:
            for pack, output in self.outputs(network, store, conditions, tokens_per_pack):
                real = pack.real_cells.cpu().numpy()
                rows = pack.cell_id.cpu().numpy()[real]
                for head in heads:
                    logits[head.task][rows] = output.predictions[head.task].float().cpu().numpy()[real]
                if attention is not None:
                    attention.take(pack)
        for head in heads:
            self.write_labels(adata, head, logits[head.task], unassigned_below)
        if attention is not None:
            attention.write(adata, self.files.vocabulary, genes)
        adata.uns["scfm"] = self.provenance(read, store, conditions, genes, precision)
        if unassigned_below is not None:
            adata.uns["scfm"]["unassigned_below"] = unassigned_below
        return adata

    @staticmethod
    def write_labels(
        adata: AnnData, head: HeadSpec, logits: NDArray[np.float32], unassigned_below: float | None
    ) -> None:
        import pandas as pd
        from scipy.special import softmax

        assert head.labels is not None
        probabilities = softmax(logits, axis=1)  # (N, C)
        best, largest = np.array(head.labels, dtype=object)[probabilities.argmax(axis=1)], probabilities.max(axis=1)
        names = list(head.labels)
        rejected = None if unassigned_below is None else largest < unassigned_below
        if head.novelty is not None and head.threshold is not None:
            adata.obs[f"{head.task}_novelty"] = score = novelty(logits, head.novelty)
            rejected = score > head.threshold if rejected is None else rejected
        if rejected is not None:
            best[rejected] = UNASSIGNED
            names = list(dict.fromkeys([*names, UNASSIGNED]))
        adata.obs[head.task] = pd.Categorical(best, categories=names)
        adata.obs[f"{head.task}_probability"] = largest
        adata.obsm[f"{head.task}_probabilities"] = probabilities

    def generate(
        self,
        prompt: AnnData,
        genes: Sequence[str] | None = None,
        *,
        steps: int,
        start: Literal["genes", "cell"] = "genes",
        tokens_per_pack: int = 16384,
    ) -> AnnData:
        """Return a new AnnData of generated values: K steps, the most confident genes first (see `scfm.generation`).

        `X` (cells, genes) holds bins, or values where the model reads raw ones; `.layers["confidence"]` how sure the
        model was, 0 to 1, and `.layers["step"]` in which step it was.

        Args:
            prompt: cells as for `embed`.
            genes: Ensembl ids or symbols to generate; all genes of `prompt` that the model knows if not given.
            steps: K; 1 is a single forward pass.
            start: `genes` starts from the expressed genes of each cell that are not to be generated; `cell` from its
                cell embedding alone.
            tokens_per_pack: most tokens in one forward pass.

        Raises:
            ScfmError: the model's `gep` head does not say how sure it is, or a gene is unknown.
        """
        from scfm.generation import generate_anndata

        return generate_anndata(self, prompt, genes, steps=steps, start=start, tokens_per_pack=tokens_per_pack)

    def finetune(self, adata: AnnData, task: str | dict[str, Any] = "annotation", **sections: Any) -> PretrainedModel:
        """Return a new model, fine-tuned for a task on labelled cells; this one stays as it is.

        Args:
            adata: cells with raw counts, and the labels in `.obs`.
            task: name of a registered task, or the recipe's task section, e.g.
                `{"name": "annotation", "label": "louvain"}`.
            **sections: other keys of the recipe, over those of the bundled one for task and model: `seed=1`,
                `out="runs/mine"` (a temporary folder if not given), `trainer={"max_epochs": 5}` ...
        """
        from scfm.tasks import TASKS

        section = {"name": task} if isinstance(task, str) else {"name": "annotation", **task}
        if section["name"] not in TASKS:
            raise ScfmError(f"task: {section['name']!r} is not known; choose one of {sorted(TASKS)}")
        return TASKS[section["name"]].finetune_anndata(self, adata, {**sections, "task": section})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as a native model directory. Raises ScfmError where the folder holds anything."""
        save_model(Path(folder), self.network, self.files)
        self.source = str(folder)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, revision: str | None = None, token: str | None = None
    ) -> PretrainedModel:
        """Return the model of a directory or of the Hub; the Hub's name for `scfm.load`."""
        return load(path, revision=revision, token=token)

    def push_to_hub(
        self, name: str, *, private: bool = True, token: str | None = None, message: str | None = None
    ) -> str:
        """Publish the model on the Hub as a native model directory and nothing else; return its URL.

        Read README.md first: it needs a licence, and `training_data.json` names sources, donors and data sets.

        Args:
            name: `org/name`, created where it is not there yet.
            private: whether only its owners see a repository that is created now.
            token: with the right to write; that of `hf auth login` or HF_TOKEN if not given.
            message: of the commit.

        Raises ScfmError where the Hub refuses or cannot be reached.
        """
        with tempfile.TemporaryDirectory() as place:
            save_model(Path(place) / "model", self.network, self.files)
            return push_folder(Path(place) / "model", name, private=private, token=token, message=message)

    def store(self, adata: AnnData, accept_normalised: bool = False, genes: GeneTable | None = None) -> CellStore:
        """Return the cells in the model's vocabulary."""
        from scfm.data.sources import store_from_anndata

        accepted = accept_normalised or self.files.value_kind == "normalised"
        return store_from_anndata(adata, self.files.vocabulary, accept_normalised=accepted, genes=genes)

    def conditions_of(self, adata: AnnData) -> dict[str, NDArray[np.int64]]:
        """Return name -> (n_cells,) index of each cell's condition (batch ...), -1 where the model does not know it."""
        import pandas as pd

        return {
            name: pd.Index(names).get_indexer(adata.obs[name].astype(str)).astype(np.int64)
            if name in adata.obs
            else np.full(adata.n_obs, -1)
            for name, names in self.files.cell_conditions.items()
        }

    def embedding_hash(self) -> str:
        """Return the sha256 of all that decides what `embed` gives: weights, vocabulary, tokenisation; heads do not."""
        config = as_plain(self.files)["config"]
        config["tokens"].pop("mask_ratios")
        decides = {name: config[name] for name in ("model", "tokens", "value_kind", "vocabulary_hash")}
        total = hashlib.sha256(json.dumps([decides, self.files.cell_conditions], sort_keys=True).encode())
        for name, tensor in sorted(self.network.state_dict().items()):
            if name.startswith("backbone."):
                total.update(name.encode())
                total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return total.hexdigest()

    def network_at(self, precision: Precision) -> nn.Module:
        """Return the network in a precision, on its device. Raises ScfmError where that does not compute it."""
        return at_precision(self.network.to(self.device), precision, self.device)

    def outputs(
        self, network: nn.Module, store: CellStore, conditions: dict[str, NDArray[np.int64]], tokens_per_pack: int
    ) -> Iterator[tuple[PackedBatch, Any]]:
        """Yield packs of all cells in turn, nothing hidden, with a network's outputs for them."""
        for pack in self.packs(store, conditions, tokens_per_pack):
            with torch.inference_mode():
                output = network(pack)
            yield pack, output

    def packs(
        self,
        store: CellStore,
        conditions: Mapping[str, Codes],
        tokens_per_pack: int,
        cells_per_batch: int = CELLS_PER_BATCH,
        rows: NDArray[np.int64] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[PackedBatch]:
        """Yield packs of all cells, or of some rows, in turn, nothing hidden; of several processes, those of one.

        A cell's random draws (genes sampled from a long cell, ties) are keyed by its own profile, never by its row.
        """
        tokens = replace(self.files.tokens, mask_ratios=(0.0,))
        keys = store_hashes(store)
        loader = PackLoader(
            self.files.reading(store),
            CellOrder(range(store.n_cells) if rows is None else rows, cells_per_batch, tokens.seed, shuffle=False),
            replace(self.files, value_kind=store.value_kind).tokeniser(tokens),
            tokens_per_pack=max(tokens_per_pack, tokens.max_genes + 1),
            cell_conditions=conditions,
            keys=keys,
            rank=rank,
            world_size=world_size,
        )
        self.network.to(self.device)
        for packs in loader.batches(epoch=0):
            for pack in packs:
                yield pack.to(self.device)

    def provenance(
        self,
        adata: AnnData,
        store: CellStore,
        conditions: dict[str, NDArray[np.int64]],
        genes: GeneTable | None = None,
        precision: Precision = "fp32",
    ) -> dict[str, Any]:
        """Return what `.uns["scfm"]` says of where the results came from."""
        present = np.unique(np.concatenate([np.unique(part.genes) for part in store.in_turn()]))
        return {
            "version": __version__,
            "model": self.source,
            "vocabulary_hash": self.files.vocabulary.hash,
            "genes_expressed_and_known": len(present),
            "genes_in_data": adata.n_vars,
            "gene_tables": genes.files if genes else [],
            "values": store.value_kind,
            "precision": precision,
            "cells_of_unknown_condition": {name: int((index < 0).sum()) for name, index in conditions.items()},
            "labels": {head.task: list(head.labels) for head in self.files.heads if head.labels},
            **{name: adata.uns[name] for name in ("orthologs",) if name in adata.uns},
        }


def load(path: str | Path, *, revision: str | None = None, token: str | None = None) -> PretrainedModel:
    """Return the model of a native model directory or of the Hub, ready to embed, predict or be fine-tuned.

    Args:
        path: the directory, or the model's name on the Hub: `org/name`.
        revision: branch, tag or commit on the Hub.
        token: for models on the Hub that are not public; that of `hf auth login` or HF_TOKEN if not given.

    Raises ScfmError where the directory is not a model, its weights do not fit, or the Hub does not have it.
    """
    network, files = load_model(model_folder(path, revision, token))
    return PretrainedModel(network, files, str(path))
