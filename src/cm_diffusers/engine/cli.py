"""What every training script shares: flags from dataclasses, recipes, and one clear sentence for a wrong input."""

import logging
import shlex
import sys
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from traceback import extract_tb
from typing import NoReturn

import diffusers
import transformers
from transformers import HfArgumentParser

from cm_diffusers.engine.run_folder import refuse_inputs_inside
from cm_diffusers.errors import read_text, readable


def parse_configs(configs: Sequence[type], description: str, argv: Sequence[str] | None = None) -> tuple:
    """Parse the command line into one instance of each dataclass.

    `--recipe NAME` reads flags from a file, found as `shipped` says; flags given on the command line win. A config with a
    method `check` is asked whether the files that it names are there, before anything is loaded.

    Args:
        configs: Dataclasses of flags.
        description: For --help.
        argv: Words to parse in place of the command line's; what they name need not be there.
    """
    parser = make_parser(configs, description)
    *parsed, unknown = parser.parse_args_into_dataclasses(
        args=_with_recipes(argv), look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        raise ValueError(f"{' '.join(unknown)}: this script has no such flag; {_advice(parser, unknown)}")
    for config in parsed[: len(configs)]:
        if getattr(config, "overwrite_output_dir", False):
            refuse_inputs_inside(config.output_dir, parsed[: len(configs)])
        if argv is None and hasattr(config, "check"):
            config.check()
    return tuple(parsed[: len(configs)])  # what follows holds --recipe, which is read by now


def _advice(parser: ArgumentParser, unknown: list[str]) -> str:
    known = [option for action in parser._actions for option in action.option_strings if len(option) > 2]
    names = [word.partition("=")[0] for word in unknown if word.startswith("--")]
    close = dict.fromkeys(match for name in names for match in get_close_matches(name, known, n=2, cutoff=0.7))
    return f"did you mean {' or '.join(close)}?" if close else "--help lists those it has."


class _Parser(HfArgumentParser):
    """Wrong words raise ValueError with one sentence; argparse would print every flag above it."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help explains the flags.")


def make_parser(configs: Sequence[type], description: str) -> HfArgumentParser:
    """What reads the command line; a flag must be written out. `parse_configs` reads the recipes before."""
    parser = _Parser(
        configs, description=description, formatter_class=ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--recipe",
        action="append",
        default=SUPPRESS,
        metavar="NAME",
        help="File of flags, by its path or by its name in the folder recipes beside the script; flags given here win.",
    )
    return parser


def _with_recipes(argv: Sequence[str] | None) -> list[str]:
    """The words of the recipes, read as a shell would, then those of the command line."""
    recipes = ArgumentParser(add_help=False, allow_abbrev=False)
    recipes.add_argument("--recipe", action="append", default=[])
    found, rest = recipes.parse_known_args(argv)
    return [word for name in found.recipe for word in _words(name)] + rest


def _words(recipe: str) -> list[str]:
    path = shipped("--recipe", recipe, ".args")
    with readable(f"--recipe {recipe}"):
        return shlex.split(read_text(path), comments=True)


def shipped(flag: str, name: str, suffix: str) -> Path:
    """A file that is there, or else one of the folder `recipes` beside the running script.

    Args:
        flag: That names it.
        name: A path, or a name in that folder with or without its suffix.
        suffix: Of such files.

    Raises:
        ValueError: There is neither.
    """
    folder = Path(sys.argv[0]).resolve().parent / "recipes"
    places = (Path(name), folder / name, folder / f"{name}{suffix}")
    if found := next((place for place in places if place.is_file()), None):
        return found
    names = (path.stem for path in folder.glob(f"*{suffix}"))
    close = ", ".join(get_close_matches(Path(name).stem, names, cutoff=0.5))
    raise ValueError(
        f"{flag} {name}: there is no such file and none of that name in the folder recipes beside the script; "
        + (f"close to it: {close}." if close else "give the path of one.")
    )


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
