"""Fine-tuning: hands a recipe to the task that it names."""

from __future__ import annotations

from pathlib import Path

from scfm.errors import ScfmError
from scfm.recipe import Recipe, TaskConfig
from scfm.tasks import TASKS


def finetune(recipe: Recipe, resume: str | None = None) -> Path:
    """Fine-tune a model for the task of a recipe; return the new model directory.

    Args:
        recipe: the run; `from` names the model, `task.name` the task, `data.shards` the cells.
        resume: `auto` or a checkpoint path continues a stopped run.
    """
    task = recipe.task or TaskConfig()
    if task.name not in TASKS:
        raise ScfmError(f"task.name: {task.name!r} is not known; choose one of {sorted(TASKS)}")
    return TASKS[task.name].finetune(recipe, resume)
