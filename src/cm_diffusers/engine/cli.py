"""What every training script shares: flags from dataclasses, recipes, and one clear sentence for a wrong input."""

import logging
import shlex
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from traceback import extract_tb

import diffusers
import transformers
from transformers import HfArgumentParser


def parse_configs(configs: Sequence[type], description: str, argv: Sequence[str] | None = None) -> tuple:
    """Parse the command line into one instance of each dataclass.

    `--recipe FILE.args` reads flags from a file; flags given on the command line win.
    """
    *parsed, unknown = make_parser(configs, description).parse_args_into_dataclasses(
        args=_with_recipes(argv), look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        raise ValueError(f"{' '.join(unknown)}: this script has no such flag; --help lists those it has.")
    return tuple(parsed)


def make_parser(configs: Sequence[type], description: str) -> HfArgumentParser:
    """What reads the command line; `parse_configs` handles `--recipe` before."""
    return HfArgumentParser(
        configs,
        description=description,
        formatter_class=ArgumentDefaultsHelpFormatter,
        epilog="--recipe FILE.args reads flags from a file, as those in training/recipes; flags given here win.",
    )


def _with_recipes(argv: Sequence[str] | None) -> list[str]:
    """The words of the recipes, read as a shell would, then those of the command line."""
    recipes = ArgumentParser(add_help=False, allow_abbrev=False)
    recipes.add_argument("--recipe", type=Path, action="append", default=[])
    found, rest = recipes.parse_known_args(argv)
    if missing := [str(path) for path in found.recipe if not path.is_file()]:
        raise ValueError(f"--recipe {missing[0]}: there is no such file.")
    return [word for path in found.recipe for word in shlex.split(path.read_text("utf-8"), comments=True)] + rest


def run(main: Callable[[], None]) -> None:
    """Call a script's main; errors this project raises about its input end it with their sentence alone."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    try:
        main()
    except (ValueError, FloatingPointError) as error:
        if not _raised_here(error):
            raise
        sys.exit(f"error: {error}")


def _raised_here(error: Exception) -> bool:
    """Whether our code raised it: an error from inside a library keeps its traceback."""
    raised_in = Path(extract_tb(error.__traceback__)[-1].filename).resolve()
    package = Path(__file__).resolve().parents[1]
    return package in raised_in.parents or raised_in.parent == Path(sys.argv[0]).resolve().parent


def refuse_changed(config: object, names: str, where: str) -> None:
    """No flag is ignored without a word: raises ValueError for one of `names` that is not at its default."""
    for field in fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name in names.split() and value != default:
            raise ValueError(f"--{field.name} has no effect {where}, but it was given ({value}): leave it out.")
