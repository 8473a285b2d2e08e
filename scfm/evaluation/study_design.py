"""What a study tries: a fine-tuning recipe, the keys that vary around it, and what cannot be tried, with the reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scfm.errors import ScfmError
from scfm.recipe import Recipe
from scfm.recipe_check import check
from scfm.recipe_reader import like, merged, read_recipe, read_yaml, recipe_file

if TYPE_CHECKING:
    from scfm.checkpoints.native import ModelFiles

INIT, TERMS = "init", "terms"
# where a model starts and what of it learns -> task.setting, trainable, what that is
INITS: dict[str, tuple[Literal["full", "scratch", "zero_shot"], list[str], str]] = {
    "pretrained": ("full", ["*"], "all weights start as pretrained and train"),
    "scratch": ("scratch", ["*"], "all weights start random and train"),
    "encoder_frozen": ("full", ["heads.*"], "backbone as pretrained and still, heads train"),
    "decoder_frozen": (
        "full",
        ["backbone.*"],
        "backbone trains, heads still: pretrained ones as they were, new ones random",
    ),
    "all_frozen": ("zero_shot", ["*"], "nothing trains; the embedding is read as it is"),
}
# what the embedding of a model that does not train depends on
READ_WITHOUT_TRAINING = (INIT, "data.n_bins", "data.max_genes", "data.tie_policy", "task.neighbours", "model.backend")
DESIGNS = ("one_at_a_time", "grid")


@dataclass(frozen=True)
class StudyRecipe:
    """The recipe of a study.

    Attributes:
        task: a task that `scfm evaluate` and `scfm finetune` know.
        recipe: the fine-tuning recipe around which keys vary: a file, or the name of a bundled one.
        base: keys over that recipe's.
        vary: key of the recipe -> its values; `objectives.NAME.KEY` is a key of a term of the loss.
        init: where the model starts and what of it learns, names of INITS, the default first; empty leaves
            `task.setting` and `trainable` as the recipe has them.
        without: terms of the loss that are left out, one at a time.
        design: `one_at_a_time` changes one key of the default; `grid` tries all combinations.
        seeds: how often each configuration is trained.
    """

    task: str
    recipe: str
    base: dict[str, Any] = field(default_factory=dict)
    vary: dict[str, list[Any]] = field(default_factory=dict)
    init: list[str] = field(default_factory=lambda: ["pretrained"])
    without: list[str] = field(default_factory=list)
    design: Literal["one_at_a_time", "grid"] = "one_at_a_time"
    seeds: int = 3


@dataclass(frozen=True)
class Factor:
    """What varies: a key of the recipe, INIT or TERMS, and its levels.

    Attributes:
        name: the key.
        levels: its values; of TERMS the term that is left out, None for all terms.
        default: index of the level that the default configuration has.
    """

    name: str
    levels: list[Any]
    default: int = 0

    def shown(self, index: int) -> str:
        """Return a level as tables write it."""
        level = self.levels[index]
        if self.name == TERMS:
            return "all" if level is None else f"without {level}"
        if isinstance(level, list):
            return ", ".join(str(one) for one in level)
        return f"{level:g}" if isinstance(level, float) else str(level).replace("_", " ")


@dataclass(frozen=True)
class Configuration:
    """One combination of levels.

    Attributes:
        name: how it differs from the default.
        levels: index of the level of each factor.
        recipe: the resolved recipe, but for seed and run directory.
        reason: why it cannot be tried; None where it can.
    """

    name: str
    levels: tuple[int, ...]
    recipe: Recipe
    reason: str | None = None


def read_study(path: Path) -> StudyRecipe:
    """Return the recipe of a study. Raises ScfmError for a key that is unknown or of the wrong type."""
    content = read_yaml(path)
    known = {one.name: one for one in fields(StudyRecipe)}
    if unknown := [key for key in content if key not in known]:
        raise ScfmError(f"{path}: {', '.join(unknown)} is no key of a study; there is {', '.join(known)}")
    if missing := [key for key in ("task", "recipe") if not content.get(key)]:
        raise ScfmError(f"{path}: {' and '.join(missing)} must be given; recipes/evaluate/study.yaml is an example")
    types = {"base": dict, "vary": dict, "init": list, "without": list, "seeds": int, "task": str, "recipe": str}
    content = {key: value for key, value in content.items() if value is not None}
    for key, kind in types.items():
        if not isinstance(content.get(key, kind()), kind):
            raise ScfmError(f"{path}: {key}: {content[key]!r} is not a {kind.__name__}")
    study = StudyRecipe(**content)
    wrong = [
        (study.design in DESIGNS, f"design: {study.design!r} is not known; choose one of {', '.join(DESIGNS)}"),
        (study.seeds >= 1, f"seeds: {study.seeds} is none"),
        (set(study.init) <= set(INITS), f"init: {study.init}; choose from {', '.join(INITS)}"),
        (
            all(isinstance(levels, list) and levels for levels in study.vary.values()),
            "vary: each key needs a list of values, [a, b, c]",
        ),
    ]
    for holds, message in wrong:
        if not holds:
            raise ScfmError(f"{path}: {message}")
    return study


def configurations_of(
    study: StudyRecipe, files: ModelFiles, label: str, settings: Sequence[str]
) -> tuple[list[Factor], list[Configuration]]:
    """Return what varies, and every configuration, the default first; those that cannot be tried say why.

    Args:
        study: the recipe of the study.
        files: of the model that is fine-tuned: its shape, bins and tokenisation are defaults.
        label: obs column of the labels.
        settings: values of `task.setting` that the task has.

    Raises ScfmError for keys and values that no recipe has, terms of the loss that are not there, and a default that
    cannot be tried.
    """
    sections = merged(
        merged(read_yaml(recipe_file(study.recipe)), study.base), {"task": {"name": study.task, "label": label}}
    )
    for key in ("out", "from", "seed"):  # of a run, not of a configuration
        sections.pop(key, None)
    base = read_recipe(None, sections, like(files))
    if study.init:
        base = changed(base, {INIT: study.init[0]})
    factors = factors_of(study.vary, base, files)
    factors += [Factor(INIT, list(study.init))] if len(study.init) > 1 else []
    there = [objective.name for objective in base.objectives]
    if absent := [term for term in study.without if term not in there]:
        raise ScfmError(f"without: {', '.join(absent)} is no term of the loss, which has {', '.join(there)}")
    factors += [Factor(TERMS, [None, *study.without])] if study.without else []
    made = []
    for levels in combinations(factors, study.design):
        given = {one.name: one.levels[k] for one, k in zip(factors, levels, strict=True) if k != one.default}
        recipe = changed(base, given)
        name = ", ".join(
            f"{one.name} {one.shown(k)}" for one, k in zip(factors, levels, strict=True) if k != one.default
        )
        made.append(Configuration(name or "default", levels, recipe, not_applicable(recipe, files, given, settings)))
    if made[0].reason is not None:
        raise ScfmError(f"the default, around which all varies, cannot be tried: {made[0].reason}")
    return factors, made


def combinations(factors: list[Factor], design: str) -> Iterator[tuple[int, ...]]:
    """Yield indices of levels, the default first: one factor changed at a time, or all combinations."""
    default = tuple(factor.default for factor in factors)
    yield default
    if design == "grid":
        yield from (levels for levels in product(*(range(len(one.levels)) for one in factors)) if levels != default)
        return
    for k, factor in enumerate(factors):
        for level in range(len(factor.levels)):
            if level != factor.default:
                yield (*default[:k], level, *default[k + 1 :])


def factors_of(vary: dict[str, list[Any]], base: Recipe, files: ModelFiles) -> list[Factor]:
    """Return keys and their values as the recipe reads them; that of the base recipe is among them.

    Raises ScfmError for a key or a value that no recipe has.
    """
    read: dict[str, list[Any]] = {name: [] for name in vary}
    for k in range(max(map(len, vary.values()), default=0)):  # reading a recipe is slow: one value of each key at once
        given = {name: levels[k] for name, levels in vary.items() if k < len(levels)}
        recipe = read_recipe(None, changed(base, given).to_dict(), like(files))
        for name in given:
            if (level := value_of(recipe, name)) not in read[name]:
                read[name].append(level)
    factors = []
    for name, levels in read.items():
        default = value_of(base, name)
        levels = levels if default in levels else [default, *levels]
        factors.append(Factor(name, levels, levels.index(default)))
    return factors


def changed(base: Recipe, changes: dict[str, Any]) -> Recipe:
    """Return a recipe with the levels of some factors. Raises ScfmError for a key that is not there."""
    recipe = deepcopy(base)
    for name, level in changes.items():
        if name == INIT:
            assert recipe.task is not None
            setting, recipe.trainable, _ = INITS[level]
            recipe.task = replace(recipe.task, setting=setting)
        elif name == TERMS:
            recipe.objectives = [one for one in recipe.objectives if one.name != level]
        else:
            section, key = place_of(recipe, name)
            setattr(section, key, level)
    return recipe


def place_of(recipe: Recipe, name: str) -> tuple[Any, str]:
    """Return the section that holds a key of a recipe, and the key in it. Raises ScfmError where it is not there."""
    *path, key = name.split(".")
    section: Any = recipe
    for k, part in enumerate(path):
        inside = {one.name: one for one in section} if isinstance(section, list) else vars(section)
        if not (isinstance(inside.get(part), list) or is_dataclass(inside.get(part))):
            raise ScfmError(f"vary: {name}: there is no {'.'.join(path[: k + 1])} in the recipe")
        section = inside[part]
    if not is_dataclass(section) or key not in vars(section) or is_dataclass(vars(section)[key]):
        raise ScfmError(f"vary: {name}: is no key of the recipe")
    return section, key


def value_of(recipe: Recipe, name: str) -> Any:
    """Return the value of a key of a recipe."""
    section, key = place_of(recipe, name)
    return getattr(section, key)


def not_applicable(recipe: Recipe, files: ModelFiles, given: dict[str, Any], settings: Sequence[str]) -> str | None:
    """Return why a configuration cannot be tried, or would be another one under a new name; None where it can.

    Args:
        recipe: resolved.
        files: of the model that it starts from.
        given: factors whose level is not the default.
        settings: values of `task.setting` that the task has.
    """
    assert recipe.task is not None
    setting = recipe.task.setting
    if setting not in settings:
        return f"{recipe.task.name} has no task.setting {setting}; it has {', '.join(settings)}"
    bins, known = recipe.data.n_bins, files.tokens.n_bins
    per_bin = recipe.model.name == "scbert" or recipe.model.value_encoder == "category"
    if "data.n_bins" in given and recipe.data.values == "raw":
        return "data.values is raw: nothing is binned"
    if bins != known and per_bin and setting != "scratch":
        return (
            f"the pretrained value encoder holds an embedding for each of its {known} bins, so that {bins} bins need a "
            "model from scratch"
        )
    unread = [name for name in given if name not in READ_WITHOUT_TRAINING]
    if setting == "zero_shot" and unread:
        return f"nothing trains, so {', '.join(unread)} is not read"
    dropped = f"objectives.{given.get(TERMS)}."
    if lost := [name for name in given if name.startswith(dropped)]:
        return f"{given[TERMS]} is left out, so {', '.join(lost)} is not read"
    try:
        check(recipe)
    except ScfmError as error:
        return " ".join(str(error).removeprefix("the recipe cannot work:").split())
    return None
