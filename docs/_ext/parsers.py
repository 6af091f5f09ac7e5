"""The command-line parser of each training script, as sphinx-argparse asks for it: `parsers.distill_lcm()`."""

import runpy
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

from cm_diffusers.engine.cli import make_parser


SCRIPTS = Path(__file__).resolve().parents[2] / "training"


def __getattr__(name: str) -> Callable[[], ArgumentParser]:
    path = SCRIPTS / f"{name}.py"
    if not path.is_file():
        raise AttributeError(f"there is no script {path.name}")
    script = runpy.run_path(str(path))
    return lambda: make_parser(script["CONFIGS"], script["__doc__"])
