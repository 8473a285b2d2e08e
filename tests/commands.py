"""Command lines of scfm, taken apart as `scfm` does, but not run."""

from __future__ import annotations

from collections.abc import Sequence

from scfm.cli import RECIPE_VERBS, VERBS, dashed, function, split, verb_parser
from scfm.recipe_reader import parse_recipe


def take(given: Sequence[str]) -> None:
    """Parse the words behind `scfm`. Raises ScfmError or an ArgumentError for what it would not take."""
    verb, arguments = split(given)
    place, what = VERBS[verb]
    if verb in RECIPE_VERBS:
        if "--from" in arguments:  # its model directory would have to exist
            at = arguments.index("--from")
            del arguments[at : at + 2]
        parse_recipe(arguments, f"scfm {verb}", what, function(place))
        return
    parser, _ = verb_parser(f"scfm {verb}", what, function(place))
    parser.exit_on_error = False
    parser.parse_args([dashed(argument) for argument in arguments])
