"""Downstream tasks, one file each; each offers `finetune(recipe, resume)` and `finetune_anndata(model, adata, ...)`."""

from __future__ import annotations

from types import ModuleType

from scfm.tasks import annotation, integration

TASKS: dict[str, ModuleType] = {"annotation": annotation, "integration": integration}
