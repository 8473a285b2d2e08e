"""Reading recipes: YAML files, command-line overrides, and the recipes that come with scfm."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import yaml

from scfm.errors import ScfmError
from scfm.recipe import (
    PUBLISHED,
    CheckpointConfig,
    DataConfig,
    GuardConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Recipe,
    TaskConfig,
    TrainerConfig,
    WandbConfig,
    defaults_of,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

BUNDLED = Path(__file__).parent / "recipes"

SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "optimizer": OptimizerConfig,
    "trainer": TrainerConfig,
    "checkpoint": CheckpointConfig,
    "guard": GuardConfig,
    "wandb": WandbConfig,
}


def bundled(name: str) -> Path:
    """Return the path of a recipe that comes with scfm, e.g. `pretrain/quickstart.yaml`."""
    path = BUNDLED / name
    assert path.is_file(), path
    return path


def recipe_file(name: str) -> Path:
    """Return a recipe's file: that of this path, else the one that comes with scfm under this name.

    Names are as in a checkout (`recipes/pretrain/quickstart.yaml`). Raises ScfmError for neither.
    """
    if Path(name).is_file():
        return Path(name)
    own = {str("recipes" / path.relative_to(BUNDLED)): path for path in sorted(BUNDLED.rglob("*.yaml"))}
    for known, path in own.items():
        if name in (known, known.removeprefix("recipes/")):
            return path
    raise ScfmError(f"{name}: there is no such recipe file; those that come with scfm are {', '.join(own)}")


def read_recipe(path: Path | None, overrides: dict[str, Any] | None = None, base: Recipe | None = None) -> Recipe:
    """Return the recipe of a YAML file.

    Args:
        path: the file; None for the defaults alone.
        overrides: keys that win over the file's, nested like it.
        base: what keys default to that neither names; unless given, as the model is published that they name.

    Raises:
        ScfmError: the file cannot be read, or a key is unknown or of the wrong type.
    """
    # the parser turns sections into its own type in place; the caller's dictionaries stay as they are
    content = deepcopy(merged(read_yaml(path) if path else {}, overrides or {}))
    section = content.get("model")
    name = section.get("name") if isinstance(section, dict) else None
    parser = recipe_parser(base or defaults_of(str(name)))
    return parsed(parser, lambda: parser.parse_object(content), str(path or "recipe"))


def parse_recipe(
    arguments: Sequence[str], program: str, description: str, action: Callable[..., Any]
) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe of a command line, and the options that its verb's function takes besides.

    A recipe with a `from` key defaults to that model's own shape and tokenisation, another one to those that the model
    it names was published with. An option of the verb that bears the name of a key (`out`) takes its place on the
    command line; in a file it is the key.
    """
    from jsonargparse import ArgumentError

    hints, helps, own = get_type_hints(action), described(action), dict(signature(action).parameters)
    del own["recipe"]
    in_place = [name for name in own if hasattr(Recipe(), name)]

    def parser_on(base: Recipe) -> ArgumentParser:
        parser = recipe_parser(base, prog=program, description=description)
        for name in own:
            if name in in_place:
                next(option for option in parser._actions if option.dest == name).help = helps[name]
            else:
                parser.add_argument(f"--{name}", type=hints[name], default=own[name].default, help=helps[name])
        return parser

    def parse(parser: ArgumentParser) -> Namespace:
        if {"-h", "--help"} & set(arguments):
            parser.exit_on_error = True
        return parser.parse_args(list(arguments))

    parser = parser_on(Recipe())
    try:
        given, arguments = taken(with_files(arguments), in_place)
        first = parse(parser)
        if first["from"]:
            from scfm.checkpoints.native import read_model

            parser = parser_on(like(read_model(first["from"])))
        elif first["model"]["name"] in PUBLISHED:
            parser = parser_on(defaults_of(first["model"]["name"]))
        options = {name: given[name] if name in in_place else first[name] for name in own}
        return parsed(parser, lambda: parse(parser), program), options
    except ArgumentError as error:
        raise ScfmError(f"{program}: {error}") from error


def with_files(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with the file of every recipe that `--config` names."""
    found = list(arguments)
    for i, argument in enumerate(found):
        if argument.startswith("--config="):
            found[i] = f"--config={recipe_file(argument.removeprefix('--config='))}"
        elif argument == "--config" and i + 1 < len(found):
            found[i + 1] = str(recipe_file(found[i + 1]))
    return found


def taken(arguments: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
    """Return the values of some options, None where one is not given, and the arguments without them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in names:
        parser.add_argument(f"--{name}")
    values, rest = parser.parse_known_args(list(arguments))
    return vars(values), rest


def described(action: Callable[..., Any]) -> dict[str, str]:
    """Return the parameters' descriptions in a function's docstring."""
    from docstring_parser import parse

    return {parameter.arg_name: parameter.description or "" for parameter in parse(action.__doc__ or "").params}


def like(files: Any) -> Recipe:
    """Return the defaults of a recipe that starts from a model: its shape, and how it reads cells."""
    tokens = {key: value for key, value in asdict(files.tokens).items() if key not in ("seed", "mask_ratios")}
    return Recipe(model=deepcopy(files.model), data=DataConfig(**tokens))


def recipe_parser(base: Recipe, **options: Any) -> ArgumentParser:
    """Return a parser whose options are the recipe's keys, with `base` as their defaults; unknown keys are errors."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, **options)
    config = "Recipe file (YAML), or one that comes with scfm; options after it override its keys."
    parser.add_argument("--config", action="config", help=config)
    parser.add_argument("--seed", type=int, default=base.seed, help="Key of every random draw.")
    parser.add_argument("--out", type=str, default=base.out, help="Run directory.")
    for section, kind in SECTIONS.items():
        parser.add_class_arguments(kind, section)
        parser.set_defaults({f"{section}.{key}": value for key, value in asdict(getattr(base, section)).items()})
    parser.add_argument("--objectives", type=list[ObjectiveConfig], default=base.objectives, help="Terms of the loss.")
    parser.add_argument("--from", type=str | None, default=base.from_model, help="Model directory to start from.")
    parser.add_argument(
        "--trainable", type=list[str], default=base.trainable, help="Name patterns of the parameters that train."
    )
    parser.add_argument("--task", type=TaskConfig | None, default=base.task, help="Task of a fine-tuning run.")
    return parser


def parsed(parser: ArgumentParser, parse: Any, name: str) -> Recipe:
    """Return the recipe that a parser reads, its errors worded as ours."""
    from jsonargparse import ArgumentError

    try:
        values = vars(parser.instantiate_classes(parse()))
    except (ArgumentError, TypeError, ValueError) as error:
        raise ScfmError(f"{name}: {error}") from error
    return Recipe(
        seed=values["seed"],
        out=values["out"],
        **{section: values[section] for section in SECTIONS},
        objectives=values["objectives"],
        from_model=values["from"],
        trainable=values["trainable"],
        task=values["task"],
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the content of a recipe file. Raises ScfmError where it is not a mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ScfmError(f"{path}: cannot be read as a recipe ({error})") from error
    if not isinstance(content, dict):
        raise ScfmError(f"{path}: is not a recipe; a recipe is a mapping of keys such as `data:` and `model:`")
    return content


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the keys of `over` on top, section by section."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result
