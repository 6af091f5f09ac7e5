"""The command-line parser of each training script, as sphinx-argparse asks for it: `parsers.distill_lcm()`."""

import runpy
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import fields
from inspect import getdoc
from pathlib import Path

from cm_diffusers.engine.cli import make_parser


SCRIPTS = Path(__file__).resolve().parents[2] / "training"


def __getattr__(name: str) -> Callable[[], ArgumentParser]:
    path = SCRIPTS / f"{name}.py"
    if not path.is_file():
        raise AttributeError(f"there is no script {path.name}")
    script = runpy.run_path(str(path))
    return lambda: grouped(make_parser(script["CONFIGS"], script["__doc__"]), script["CONFIGS"])


def grouped(parser: ArgumentParser, configs: Sequence[type]) -> ArgumentParser:
    """The parser with a group of flags for each dataclass, under the first sentence of its docstring."""
    actions = parser._optionals._group_actions
    for config in configs:
        names = {field.name for field in fields(config)}
        group = parser.add_argument_group(getdoc(config).split("\n")[0].rstrip("."))
        group._group_actions = [action for action in actions if action.dest in names]
    for action in actions:
        action.option_strings = [flag for flag in action.option_strings if "-" not in flag[2:]]  # --a_b without --a-b
        action.help = (action.help or "").replace("*", r"\*")  # it is read as reStructuredText
    needed = [f"{action.option_strings[0]} ..." for action in actions if action.required]
    parser.usage = " ".join(["%(prog)s", *needed, "[--recipe FILE.args] [flags]"])
    parser._optionals._group_actions = []  # --help is all that is left of them
    return parser
