"""The recipe's task section: what a pretrained model is to learn, from which labels, and how much of it learns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class LoRAConfig:
    """What trains where `task.setting` is lora: low-rank updates of linear layers, merged into them at the end.

    Args:
        rank: Of each update.
        alpha: Updates are scaled by alpha / rank.
        layers: Name patterns of the linear layers of the backbone that get one.
        lr_factor: Peak learning rate as a multiple of optimizer.lr: updates that start at zero bear, and need, more.
    """

    rank: int = 8
    alpha: float = 16.0
    layers: list[str] = field(default_factory=lambda: ["backbone.blocks.*"])
    lr_factor: float = 10.0


@dataclass
class TaskConfig:
    """The downstream task of a fine-tuning or evaluation run.

    Args:
        name: Registered task, e.g. annotation.
        label: obs column that the task predicts.
        batch: For integration, obs column of the batches that are to be mixed.
        genes: For integration, read only so many genes, those that vary most within batches; null reads all.
        setting: What of the model learns: `full`, all weights that `trainable` names, from the pretrained ones;
            `scratch`, the same from random ones; for annotation also `lora`, low-rank updates and the head; `probe`, a
            linear classifier on the frozen cell embedding (logistic regression); `zero_shot`, nothing: the nearest
            labelled cells vote.
        lora: What only the setting lora reads.
        neighbours: For zero_shot, how many cells vote.
        class_weights: `balanced` weights classes by their inverse frequency; `none` counts every cell alike.
        cells_per_type: Learn from at most so many cells of each type, drawn by the seed, validation included; null
            takes all.
        novel_types: Label cells `Unassigned` that look like none of the types: by the largest `probability` or by the
            `energy` of the logits; `none` gives every cell a type.
        known_kept: With novel_types, the share of the validation cells that keep a label, which sets the threshold.
        unlabelled: Values of the label column that mean "no label"; such cells are left out.
        min_cells: Classes with fewer cells are an error.
        min_steps: Fewer optimizer steps than these are too few: few cells are passed over more often.
    """

    name: str = "annotation"
    label: str = "cell_type"
    batch: str = "batch"
    genes: int | None = None
    setting: Literal["full", "scratch", "lora", "probe", "zero_shot"] = "full"
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    neighbours: int = 10
    class_weights: Literal["none", "balanced"] = "none"
    cells_per_type: int | None = None
    novel_types: Literal["none", "probability", "energy"] = "none"
    known_kept: float = 0.95
    unlabelled: list[str] = field(default_factory=lambda: ["unknown", "nan", ""])
    min_cells: int = 2
    min_steps: int = 0


def wrong_task(task: TaskConfig, trainable: list[str], valid_fraction: float) -> list[str]:
    """Return what keeps the task section from working, beside two other keys of the recipe, by key."""
    kept = task.known_kept
    rules = [
        (task.lora.rank >= 1, f"task.lora.rank: {task.lora.rank} must be at least 1"),
        (task.lora.alpha > 0, f"task.lora.alpha: {task.lora.alpha} must be positive"),
        (bool(task.lora.layers), "task.lora.layers: is empty; [backbone.blocks.*] adapts all blocks"),
        (task.lora.lr_factor > 0, f"task.lora.lr_factor: {task.lora.lr_factor} must be positive"),
        (task.genes is None or task.genes >= 1, f"task.genes: {task.genes} is none"),
        (task.neighbours >= 1, f"task.neighbours: {task.neighbours} must be at least 1"),
        (
            task.cells_per_type is None or task.cells_per_type >= 1,
            f"task.cells_per_type: {task.cells_per_type} is none",
        ),
        (0 < kept <= 1, f"task.known_kept: {kept} must lie in (0, 1]"),
        (
            trainable == ["*"] or task.setting == "full",
            f"trainable: {trainable} says what the setting full trains; task.setting {task.setting} decides it "
            "by itself: leave trainable out, or set task.setting: full",
        ),
        (
            task.novel_types == "none" or (task.cells_per_type or 2) > 1,
            "task.novel_types: needs validation cells to set its threshold, and task.cells_per_type 1 leaves none",
        ),
        (
            task.novel_types == "none" or valid_fraction > 0,
            "task.novel_types: needs validation cells to set its threshold; raise data.valid_fraction",
        ),
    ]
    return [message for holds, message in rules if not holds]
