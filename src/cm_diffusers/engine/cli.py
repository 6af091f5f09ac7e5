"""What every training script shares: flags from dataclasses, recipes, and one clear sentence for a wrong input."""

import logging
import os
import re
import sys
import time
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import NoReturn

from transformers.hf_argparser import HfArgumentParser

from cm_diffusers.engine.flag_names import OURS
from cm_diffusers.engine.launcher import refuse_half_on_cpu, refuse_lone_processes
from cm_diffusers.engine.recipes import with_recipes
from cm_diffusers.errors import UserError
from cm_diffusers.extras import check_installed
from cm_diffusers.places import without_secrets
from cm_diffusers.ranges import check_ranges


HOME = re.compile(r"(?:^|(?<=[:,{]))~[\w.-]*(?=/|$)")  # somebody's, at the beginning of a path
PATIENCE = 2.0  # seconds: a launcher ends the other processes within a fraction of one


def parse_configs(configs: Sequence[type], description: str, argv: Sequence[str] | None = None) -> tuple:
    """Parse the command line into one instance of each dataclass, as `parse_words` does.

    A config with a method `check` is asked whether the files that it names are there, before anything is loaded.

    Args:
        configs: Dataclasses of flags.
        description: For --help.
        argv: Words to parse in place of the command line's; what they name need not be there, nor what they need installed.
    """
    parsed = parse_words(configs, description, argv)
    refuse_lone_processes(
        shares=any(hasattr(config, "max_train_steps") or getattr(config, "shares", False) for config in parsed)
    )
    for config in parsed:
        if getattr(config, "overwrite_output_dir", False):
            from cm_diffusers.engine.run_folder import refuse_inputs_inside

            refuse_inputs_inside(config.output_dir, parsed)
        if argv is None:
            refuse_half_on_cpu(getattr(config, "mixed_precision", "no"))
            if hasattr(config, "check"):
                config.check()
    return parsed


def parse_words(configs: Sequence[type], description: str, argv: Sequence[str] | None = None) -> tuple:
    """Words become one instance of each dataclass; no file that they name is looked for but recipes.

    `--recipe NAME` reads flags from a file, found as `shipped` says; flags given on the command line win, and the recipe
    gives way to them as `with_recipes` says.

    Args:
        configs: Dataclasses of flags; with one whose `is_run` is false, what flags need is not looked for.
        description: For --help.
        argv: Words to parse in place of the command line's.

    Raises:
        ValueError: A flag that is not there, a value that makes no sense, or one that needs what is not installed.
    """
    parser = make_parser(configs, description)
    *parsed, unknown = parser.parse_args_into_dataclasses(
        args=with_recipes(argv), look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        raise UserError(f"{' '.join(unknown)}: this script has no such flag; {_advice(parser, unknown)}")
    parsed = tuple(parsed[: len(configs)])  # what follows holds --recipe, which is read by now
    if argv is None and all(getattr(config, "is_run", True) for config in parsed):  # no look at what flags would mean
        check_installed(parsed)
    for config in parsed:
        _expand_home(config)
        check_ranges(config)
    return parsed


def _expand_home(config: object) -> None:
    """`~` begins a path also where no shell has read it: in a recipe, in quotes, behind an equals sign or a reward's name."""

    def expanded(value: object) -> object:
        if isinstance(value, list):
            return [expanded(item) for item in value]
        return HOME.sub(lambda found: os.path.expanduser(found[0]), value) if isinstance(value, str) else value

    for field in fields(config):
        if (value := getattr(config, field.name)) != field.default:
            setattr(config, field.name, expanded(value))


def _advice(parser: ArgumentParser, unknown: list[str]) -> str:
    options = (option for action in parser._actions for option in action.option_strings)
    known = [option for option in options if len(option) > 2 and "-" not in option[2:]]  # each has a twin with dashes
    names = [word.partition("=")[0] for word in unknown if word.startswith("--")]
    translated = [f"--{ours}" for name in names for ours in OURS.get(name[2:], "").split()]
    close = dict.fromkeys(name for name in translated if name in known)
    if not close:
        close = dict.fromkeys(match for name in names for match in get_close_matches(name, known, n=2, cutoff=0.7))
    return f"did you mean {' or '.join(close)}?" if close else "--help lists those it has."


class _Parser(HfArgumentParser):
    """Wrong words raise UserError with one sentence; argparse would print every flag above it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help explains the flags.")


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


def run(main: Callable[[], None]) -> None:
    """Call a script's main; a user's error ends it with its sentence alone, any other keeps its traceback."""
    import diffusers
    import transformers

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    with in_one_sentence():
        main()


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """A user's error, or a training that diverges, ends the process with its sentence alone."""
    try:
        yield
    except Exception as error:
        told = isinstance(error, UserError | FloatingPointError)
        _take_turn(told)
        if not told:
            raise
        sys.exit(f"error: {without_secrets(str(error))}")


def _take_turn(told: bool) -> None:
    """Of several processes one tells what is wrong: the launcher ends those that wait here once it has.

    Args:
        told: Whether it is one sentence; what else is raised may only follow from another process' end.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        time.sleep((0 if told else 2 * PATIENCE) + (PATIENCE if int(os.environ.get("RANK", "0")) else 0))


def refuse_changed(config: object, names: str, where: str) -> None:
    """No flag is ignored without a word: raises ValueError for one of `names` that is not at its default."""
    for field in fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name in names.split() and value != default:
            raise UserError(f"--{field.name} has no effect {where}, but it was given ({value}): leave it out.")
