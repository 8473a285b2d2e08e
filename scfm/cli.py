"""The command line: verbs, each a typed function somewhere else; no logic here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from scfm.errors import RunStopped, ScfmError
from scfm.version import __version__

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# verb -> (module:function, what it does); the function's signature and docstring are the verb's options and help
VERBS = {
    "demo": ("scfm.demo:demo", "bundled real cells -> shards -> pretraining -> annotation -> report.html"),
    "prepare": ("scfm.data.prepare:prepare", "h5ad, 10x, loom, folders of them, or a Census -> a shard directory"),
    "compress": ("scfm.data.transport:compress", "a shard directory -> a copy half the size, for object stores"),
    "inspect": ("scfm.inspecting.inspect:inspect", "what is in a shard directory, as tables and a page with figures"),
    "verify": ("scfm.data.transport:verify", "compare every shard with the SHA-256 in its manifest"),
    "check": ("scfm.checking:check_file", "raw counts? which genes match? exit code 1 where a file would not work"),
    "plan": ("scfm.plan:plan", "parameters, FLOPs, memory and hours of a recipe, before it is launched"),
    "pretrain": ("scfm.training.run:pretrain", "a recipe and shards -> a pretrained model"),
    "finetune": ("scfm.training.finetune:finetune", "a recipe, a model and labelled shards -> a fine-tuned model"),
    "status": ("scfm.status:status", "how a run stands: step, time left, losses, checkpoints; also while it runs"),
    "embed": ("scfm.inference:embed", "write cell embeddings into .obsm of an h5ad file"),
    "predict": ("scfm.inference:predict", "write predicted labels into .obs of an h5ad file"),
    "index": ("scfm.tasks.mapping:index", "embed labelled cells into a reference index, or add cells to one"),
    "map": ("scfm.tasks.mapping:map_cells", "write labels of the nearest reference cells into .obs of an h5ad file"),
    "evaluate": ("scfm.evaluation.evaluate:evaluate", "score models on a task, beside baselines and controls"),
    "study": (
        "scfm.evaluation.study:study",
        "which keys of a fine-tuning recipe matter: a grid, resumable, in parallel",
    ),
    "convert": (
        "scfm.checkpoints.convert:convert",
        "checkpoints of scGPT and scBERT to scfm and back; to ONNX",
    ),
    "bench attention": ("scfm.bench.attention:attention", "every attention backend of a device beside the dense mask"),
    "bench loader": ("scfm.bench.loader:loader", "cells on disk -> packed batches, cells per second"),
    "bench train": ("scfm.bench.train:train", "training steps of a recipe: cells per second, MFU, memory"),
    "bench embed": ("scfm.bench.embed:embed", "inference of a recipe's model: cells per second, bf16 beside fp32"),
}
RECIPE_VERBS = ("plan", "pretrain", "finetune", "bench train", "bench embed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code.

    0; 1 where a check failed or a process of a run was lost; 2 for bad input, said in one message; 75 for a run that
    was asked to stop and has saved itself.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given in (["--version"], ["-V"]):
        print(f"scfm {__version__}")
        return 0
    if not given or given[0] in ("-h", "--help"):
        print(overview())
        return 0
    verb, rest = split(given)
    if verb not in VERBS and rest in (["-h"], ["--help"]) and any(name.startswith(f"{verb} ") for name in VERBS):
        print(overview(f"{verb} "))
        return 0
    try:
        passed = run(verb, rest)
    except ScfmError as error:
        print(f"scfm: {error}", file=sys.stderr)
        return 2
    except RunStopped as stopped:
        print(f"scfm: {stopped}", file=sys.stderr)
        return int(stopped.code or 0)
    return 0 if passed else 1


def split(given: Sequence[str]) -> tuple[str, list[str]]:
    """Return the verb that a command line begins with, which may be of two words, and the rest."""
    words = 2 if " ".join(given[:2]) in VERBS else 1
    return " ".join(given[:words]), list(given[words:])


def overview(beginning: str = "") -> str:
    """Return the verbs, or those with a beginning, a line each."""
    lines = [f"  {verb:<17}{what}" for verb, (_, what) in VERBS.items() if verb.startswith(beginning)]
    purpose = "Single-cell foundation models: train, fine-tune, score and export."
    closing = "scfm VERB --help shows its options."
    return "\n".join([f"usage: scfm {beginning or 'VERB '}...", "", purpose, "", *lines, "", closing])


def run(verb: str, arguments: Sequence[str]) -> bool:
    """Parse the arguments of a verb by its function's signature, and call it.

    False where the function returns False, or something whose `passed` is False.

    Raises ScfmError for an unknown verb.
    """
    if verb not in VERBS:
        raise ScfmError(f"{verb!r} is not a verb; choose one of {', '.join(VERBS)}")
    place, what = VERBS[verb]
    if verb in RECIPE_VERBS:
        from scfm.recipe_reader import parse_recipe

        recipe, options = parse_recipe(arguments, f"scfm {verb}", what, function(place))
        function(place)(recipe, **options)
        return True
    action = function(place)
    parser, first = verb_parser(f"scfm {verb}", what, action)
    values = vars(parser.parse_args([dashed(argument) for argument in arguments]))
    made = action(*([values.pop(first)] if first else []), **values)
    return getattr(made, "passed", made) is not False


def verb_parser(program: str, what: str, action: Callable[..., Any]) -> tuple[ArgumentParser, str | None]:
    """Return a parser made from a function's signature, and the name of its positional argument.

    A first parameter without a default is the positional one (several values where it is a list), others are options;
    one that is False unless given is a flag.
    """
    from jsonargparse import ArgumentParser

    from scfm.recipe_reader import described

    parser = ArgumentParser(prog=program, description=what)
    hints, helps = get_type_hints(action), described(action)
    parameters = signature(action).parameters
    required = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    first = required[0] if required and required[0] == next(iter(parameters)) else None
    for name, parameter in parameters.items():
        options: dict[str, Any] = {"type": hints[name], "help": helps.get(name, "")}
        if get_origin(hints[name]) in (list, Sequence):  # written as a shell writes them: --obs cell_type batch
            options |= {"type": get_args(hints[name])[0], "nargs": "+"}
        if name == first:
            parser.add_argument(name, **options)
            continue
        if parameter.default is False:
            options = {"action": "store_true", "help": options["help"]}
        elif name in required:
            options["required"] = True
        else:
            options["default"] = list(parameter.default) if "nargs" in options else parameter.default
        parser.add_argument(dashed(f"--{name}"), **options)
    return parser, first


def dashed(argument: str) -> str:
    """Return an option with dashes in its name, as options are named here; both spellings are taken."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def function(place: str) -> Callable[..., Any]:
    """Import a function by `module:name`, and only then what it needs."""
    module, name = place.split(":")
    return getattr(import_module(module), name)


if __name__ == "__main__":
    sys.exit(main())
