"""The recipe: one typed schema for every run, read from YAML, overridden from the command line, saved with the run.

The dataclasses below are the single source of names, types, defaults and help, which `scfm pretrain --help` shows.
Classes are named by registered names (`model.name: scgpt`), never by import path, so a recipe cannot execute code.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from scfm.recipe_task import TaskConfig
from scfm.redaction import without_secrets

TiePolicy = Literal["left", "random"]


@dataclass
class DataConfig:
    """What the model reads, and how cells become tokens.

    Args:
        shards: Shard directory written by `scfm prepare`: a path, or a URL that fsspec knows (s3://, http:// ...).
        cache: Local folder for shards that are fetched; null for scfm/shards in the user's cache folder.
        cache_gb: The most that fetched shards may take there, in GB.
        skip_damaged: Pretraining: read and check all shards first, and go on without those that are damaged or missing.
        genes: `expressed` reads the non-zero genes of each cell; `all` every gene of the vocabulary, zeros included.
        max_genes: Most genes of a cell that become tokens, `<cls>` not counted; longer cells are sampled down.
        cells_per_batch: Cells in one optimizer step, over all devices (the global batch).
        tokens_per_pack: Most tokens in one forward pass on one device; a global batch takes as many passes as needed.
            `auto` measures what the device's memory holds, by trial steps before the first.
        fill_packs: Fill all packs of a global batch to one length with pseudo-cells: even memory, few shapes (GPUs).
        values: `binned` by the cell's own quantiles (scGPT), `log2` of 1 + counts per 10,000, rounded down (scBERT; a
            cell's total is that over the vocabulary's genes, and normalised shards must hold these logarithms already),
            or `raw` to hand the model the values as they are (scGPT's perturbation models).
        n_bins: Value bins; 0 is zero expression, 1 to n_bins - 1 are quantiles of the cell's non-zero values, or for
            log2 its integers, the last of them and all above.
        tie_policy: Where equal values fall: `left` (all into their highest bin), or `random` (spread, keyed by cell).
        mask_ratios: A cell's share of unknown genes is drawn from these, e.g. [0.25, 0.5, 0.75]; [0] hides nothing.
        mask_candidates: Genes that may be hidden: `all`, of which the share is rounded down (scGPT), or `expressed`,
            those whose bin is not 0, of which the share is rounded up (scBERT).
        mask_kept: Share of the unknown genes whose value the model sees although it has to predict it (scBERT: 0.1).
        cls_value: The value given to `<cls>`; -2 as in scGPT's pretraining.
        mask_value: The value that stands for a hidden one where attention is full; -1 as in scGPT.
        valid_fraction: Share of cells held out for validation, where the shards do not say which cells are.
        sample_by: obs column (tissue, source, cell_type ...) of which rare groups come more often in training, and
            frequent ones less often; null reads all training cells alike.
        sample_power: The share of a group is proportional to its cells to this power: 1 changes nothing, 0 gives all
            groups the same; with a temperature T it is 1 / T.
        sample_weights: Factors on the shares of groups, by name, e.g. {lung: 2.0}; 1 where none is named.
        sample_repeats: Most times that the cells of a group are read in an epoch, on average (an epoch reads as many
            cells as there are); what is too much for a group goes to the others.
        gene_conditions: Per-gene conditions: {name: TSV file with the columns `gene` and `condition`}.
        threads: Threads that prepare batches ahead of the step.
        prefetch: Global batches prepared ahead.
        read: How shards are read: `map` into memory, `read` whole runs of cells into buffers, or `auto`: a map where
            they are at most 100 and take at most half of the machine's memory.
    """

    shards: str | None = None
    cache: str | None = None
    cache_gb: float = 100.0
    skip_damaged: bool = False
    genes: Literal["expressed", "all"] = "expressed"
    max_genes: int = 1199
    values: Literal["binned", "log2", "raw"] = "binned"
    cells_per_batch: int = 512
    tokens_per_pack: int | Literal["auto"] = 65536
    fill_packs: bool = False
    n_bins: int = 51
    tie_policy: TiePolicy = "left"
    mask_ratios: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])
    mask_candidates: Literal["all", "expressed"] = "all"
    mask_kept: float = 0.0
    cls_value: float = -2.0
    mask_value: float = -1.0
    valid_fraction: float = 0.003
    sample_by: str | None = None
    sample_power: float = 0.5
    sample_weights: dict[str, float] = field(default_factory=dict)
    sample_repeats: float = 10.0
    gene_conditions: dict[str, str] = field(default_factory=dict)
    threads: int = 1
    prefetch: int = 4
    read: Literal["auto", "map", "read"] = "auto"


@dataclass
class PerformerConfig:
    """What only scBERT's blocks know.

    Args:
        mode: `correct`, or `compat`, which computes as the original does: batch mates and padding then matter.
        head_width: Width of a head, d (the original: 64, whatever the width of the model).
        features: Random features of FAVOR+ per head, m; null for int(d ln d).
        kernel: `exp` (FAVOR+), `relu` or `gelu` (the original's generalized attention), or `none` (softmax of queries
            over their width and of keys over the genes, without random features).
        scaling: Lengths of the random directions: `constant` sqrt(d), or `norms` drawn as those of Gaussian vectors.
        redraw_every: Optimizer steps between two draws of the features (compat: forward passes); 0 keeps them.
        norm: Of the branches: `layer`, `scale` (ScaleNorm) or `rezero` (none, and a learned factor that starts small).
        glu: Whether the feed-forward layer is gated.
        reversible: Two streams, each updated from the other (Reformer).
        tied: Whether the value embedding also reads the bins out.
        qkv_bias: Whether queries, keys and values have a bias.
    """

    mode: Literal["correct", "compat"] = "correct"
    head_width: int = 64
    features: int | None = None
    kernel: Literal["exp", "relu", "gelu", "none"] = "exp"
    scaling: Literal["constant", "norms"] = "constant"
    redraw_every: int = 1000
    norm: Literal["layer", "scale", "rezero"] = "layer"
    glu: bool = False
    reversible: bool = False
    tied: bool = False
    qkv_bias: bool = False


@dataclass
class ModelConfig:
    """The shape of the model.

    Args:
        name: Registered model name.
        width: Width of a token, D.
        heads: Attention heads, H; must divide the width, but for scBERT, whose heads have a width of their own.
        layers: Transformer blocks.
        hidden: Width of the feed-forward layer (scGPT: the same as the width).
        dropout: Dropout of the value encoder and of both residual branches of a block.
        attention_dropout: Dropout of attention weights; costs several times the speed, for no fast kernel has it.
        norm: `post` (the published models), or `pre`, scGPT's variant whose residual carries the normalised input.
        activation: Activation of the feed-forward layer.
        value_encoder: `continuous` (MLP of the value), `category` (embedding per bin) or `scaling` (gene times value).
        attention: `generative` (unknown genes see the known ones and themselves) or `full` (all tokens of a cell).
        unknown_output_projection: Whether unknown genes pass the output projection; scGPT's weights expect false.
        backend: Attention backend; `auto` picks the fastest that the device has.
        cell_embedding: The `<cls>` token, the mean of the known tokens, or their value-weighted sum (L2-normalised).
        cell_conditions: obs columns (batch, donor ...) whose embeddings join what the value decoders read.
        input_norm: Norm of the embedded tokens over the cells: `none`, `batch` (one batch norm, as scGPT had until
            September 2023), or `domain` (DSBN: statistics of their own for the cells of each domain).
        domain: For input_norm domain, the obs column that tells the domain (batch, donor ...).
        modality: The gene condition (of `data.gene_conditions`) that is a gene's modality: its embedding joins what the
            value decoders read instead of the token (scGPT's multi-omic model).
        mixer: What scBERT's blocks mix genes with: `favor` (FAVOR+ features), `linear` (elu + 1) or exact `softmax`.
        performer: What only scBERT's blocks know.
        gene_table: scBERT: an .npy file of gene vectors (genes, width) that stay frozen, e.g. gene2vec; the gene names
            stand beside it, one a line, in a .txt file of the same name. Null for vectors that are learned. A
            model that was converted from scBERT names its checkpoint.
        padded_batches: Compute as scGPT does on padded batches: DSBN by the first cell's domain, and padding counted in
            norm statistics and in mean and weighted cell embeddings. For comparisons only: batch mates then matter.
    """

    name: str = "scgpt"
    width: int = 512
    heads: int = 8
    layers: int = 12
    hidden: int = 512
    dropout: float = 0.2
    attention_dropout: float = 0.0
    norm: Literal["post", "pre"] = "post"
    activation: Literal["relu", "gelu"] = "relu"
    value_encoder: Literal["continuous", "category", "scaling"] = "continuous"
    attention: Literal["generative", "full"] = "generative"
    unknown_output_projection: bool = True
    backend: Literal["auto", "flash", "flash_attn_2", "flash_attn_3", "flex", "flash_cpu", "blocks_cpu", "dense"] = (
        "auto"
    )
    cell_embedding: Literal["cls", "mean", "weighted"] = "cls"
    cell_conditions: list[str] = field(default_factory=list)
    input_norm: Literal["none", "batch", "domain"] = "none"
    domain: str | None = None
    modality: str | None = None
    mixer: Literal["favor", "linear", "softmax"] = "favor"
    performer: PerformerConfig = field(default_factory=PerformerConfig)
    gene_table: str | None = None
    padded_batches: bool = False


@dataclass
class ObjectiveConfig:
    """One term of the loss.

    Args:
        name: Registered objective: gep, gepc, cell_prompt, ecs, cls, dar, cce, masked_bin.
        weight: Its factor in the sum.
        loss: For values, `mse` over bins (the released code) or `cross_entropy` over bins (the paper's formula).
        nonzero: For gep and gepc, also learn whether a gene is expressed (scGPT's explicit zero probability).
        threshold: For ecs, the similarity above which cells are drawn together, and below which they are pushed apart.
        condition: For dar, the obs column (batch, donor ...) that the cell embedding should not tell.
        temperature: For cce, what cosine similarities are divided by.
        head: For cls, what reads the class: `cell`, the cell embedding, or `genes`, a number per gene (scBERT).
        start_step: First optimizer step in which the term counts.
    """

    name: str
    weight: float = 1.0
    loss: Literal["mse", "cross_entropy"] = "mse"
    nonzero: bool = False
    threshold: float = 0.8
    condition: str | None = None
    temperature: float = 0.5
    head: Literal["cell", "genes"] = "cell"
    start_step: int = 0


@dataclass
class OptimizerConfig:
    """How the weights move.

    Args:
        name: `adamw`, or `muon` (for the matrices of the transformer blocks, with AdamW for all else).
        lr: Peak learning rate; Muon's updates are scaled to the size of AdamW's.
        betas: AdamW's decay of the first and second moment.
        eps: AdamW's term added to the denominator.
        momentum: Muon's (Nesterov) momentum.
        weight_decay: Decoupled weight decay, on matrices only (no biases, norms or embeddings).
        warmup: Optimizer steps of linear warm-up; a number below 1 is a share of all steps. For cosine_restarts, whole
            epochs at the start of each cycle.
        schedule: What follows the warm-up: `cosine` to zero, `constant`, or `cosine_restarts`: cycles, each a warm-up
            and a cosine from min_lr and back to it, the rate the same throughout an epoch (scBERT).
        cycle_epochs: For cosine_restarts, epochs of the first cycle, its warm-up included.
        cycle_growth: For cosine_restarts, how many times as long each cosine is as the one before.
        cycle_decay: For cosine_restarts, the peak rate of each cycle as a share of the one before.
        min_lr: For cosine_restarts, the rate that cycles start and end with.
        clip: Largest L2 norm of the gradient; 0 turns clipping off.
    """

    name: str = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.0
    warmup: float = 0.0
    schedule: Literal["cosine", "constant", "cosine_restarts"] = "cosine"
    cycle_epochs: int = 15
    cycle_growth: float = 2.0
    cycle_decay: float = 0.9
    min_lr: float = 1e-6
    clip: float = 1.0


@dataclass
class TrainerConfig:
    """Options of `lightning.Trainer`, by its own names, and the first two of ours.

    Gradient accumulation and clipping are not among them: they follow from `data.cells_per_batch`,
    `data.tokens_per_pack` and `optimizer.clip`. Callbacks, loggers and plugins are objects, not values of a recipe.

    Args:
        compile: Compile each transformer block with `torch.compile`: minutes at the start, then fused kernels (GPUs).
        gradient_checkpointing: Recompute each block in the backward: a fraction of the memory for a third more time.
        strategy: `auto` (one device, or ddp for several), `ddp`, `fsdp` (FSDP2: weights, gradients and optimizer states
            are cut over the devices), or a name of Lightning's, e.g. ddp_fork; fsdp_fork is the same for FSDP2.
    """

    compile: bool = False
    gradient_checkpointing: bool = False

    accelerator: str = "auto"
    strategy: str = "auto"
    devices: int | str | list[int] = "auto"
    num_nodes: int = 1
    precision: str | int = "32"
    max_epochs: int | None = None
    min_epochs: int | None = None
    max_steps: int = -1
    min_steps: int | None = None
    max_time: str | None = None
    limit_train_batches: int | float | None = None
    limit_val_batches: int | float | None = None
    limit_test_batches: int | float | None = None
    limit_predict_batches: int | float | None = None
    overfit_batches: int | float = 0.0
    fast_dev_run: int | bool = False
    val_check_interval: int | float | None = None
    check_val_every_n_epoch: int | None = 1
    num_sanity_val_steps: int = 0
    log_every_n_steps: int = 10
    deterministic: bool | Literal["warn"] | None = None
    benchmark: bool | None = None
    inference_mode: bool = True
    profiler: str | None = None
    detect_anomaly: bool = False
    sync_batchnorm: bool = False
    enable_model_summary: bool = False


@dataclass
class ProbeConfig:
    """A linear probe: how well a linear classifier reads labels off the frozen cell embeddings.

    Args:
        data: A small labelled .h5ad file of cells that the run does not train on.
        label: Its obs column of labels.
    """

    data: str
    label: str


@dataclass
class CheckpointConfig:
    """When a run is saved, which of its weights are exported, and when it ends early.

    Args:
        every_steps: Optimizer steps between checkpoints.
        every_minutes: The most minutes between checkpoints, whatever the steps; 0 counts steps alone.
        keep: Checkpoints kept besides the best.
        best: The metric whose best weights are exported, e.g. valid/loss, valid/cls_accuracy or probe/accuracy; one
            whose name ends in `accuracy` or `f1` should be high, any other low.
        patience: Validations in a row without a better `best` after which the run ends; 0 never ends it early.
        probe: A linear probe at every validation; null for none.
    """

    every_steps: int = 1000
    every_minutes: float = 30.0
    keep: int = 2
    best: str = "valid/loss"
    patience: int = 0
    probe: ProbeConfig | None = None

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether the best metric is the lowest or the highest."""
        return "max" if self.best.endswith(("accuracy", "f1")) else "min"


@dataclass
class GuardConfig:
    """Which updates are left out because they would do harm, and what follows where many are.

    An update whose loss or gradient is NaN or infinite is always left out.

    Args:
        spike: How far a loss may lie above the median of the last ones, in median absolute deviations (of which each
            counts as at least a hundredth of the median), before its update is left out; 0 takes all finite losses.
            For long pretraining, e.g. 20; not for fine-tuning, whose few high losses near the end teach the most.
        window: How many of the last losses the median is of; none is a spike before there are as many.
        patience: Updates left out in a row after which the weights go back to those of a checkpoint before.
        rollbacks: How often the weights may go back before the run gives up.
    """

    spike: float = 0.0
    window: int = 64
    patience: int = 20
    rollbacks: int = 3


@dataclass
class WandbConfig:
    """Weights & Biases logging, off unless a project is named.

    Args:
        project: Project name; null turns wandb off.
        name: Name of the run.
        mode: `online`, or `offline` (written under the run directory, synchronised by hand).
    """

    project: str | None = None
    name: str | None = None
    mode: Literal["online", "offline"] = "online"


@dataclass
class Recipe:
    """Everything that defines a run; `from_model` stands under `from` in YAML: where fine-tuning starts."""

    seed: int = 0
    out: str = "runs/run"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objectives: list[ObjectiveConfig] = field(default_factory=list)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    from_model: str | None = None
    trainable: list[str] = field(default_factory=lambda: ["*"])
    task: TaskConfig | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain types, with `from_model` under its YAML name `from`."""
        plain = asdict(self)
        plain["optimizer"]["betas"] = list(self.optimizer.betas)
        plain["from"] = plain.pop("from_model")
        return plain

    @property
    def cell_conditions(self) -> list[str]:
        """The obs columns that the model or an objective asks for, the task's label aside."""
        asked = [self.model.domain, *(objective.condition for objective in self.objectives)]
        return list(dict.fromkeys([*self.model.cell_conditions, *(name for name in asked if name)]))

    def save(self, path: Path) -> None:
        """Write the resolved recipe as YAML, `***` for the secrets in its URLs."""
        path.write_text(yaml.safe_dump(without_secrets(self.to_dict()), sort_keys=False), encoding="utf-8")


# What keys default to where `model.name` is not scgpt: as the model was published
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "scbert": {
        "data": {
            "genes": "all",
            "max_genes": 16906,
            "values": "log2",
            "n_bins": 6,
            "mask_ratios": [0.15],
            "mask_candidates": "expressed",
            "mask_kept": 0.1,
            "cls_value": 0.0,
            "mask_value": 6.0,
        },
        "model": {
            "name": "scbert",
            "width": 200,
            "heads": 10,
            "layers": 6,
            "hidden": 800,
            "dropout": 0.0,
            "attention": "full",
            "cell_embedding": "mean",
        },
    }
}


def defaults_of(model_name: str) -> Recipe:
    """Return a recipe in which every key has its default for a model."""
    published = PUBLISHED.get(model_name, {})
    return Recipe(data=DataConfig(**published.get("data", {})), model=ModelConfig(**published.get("model", {})))
