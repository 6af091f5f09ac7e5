"""Plan a training on several GPUs without any weights: memory of each part and images a second, for DDP, FSDP2 and HSDP.

It takes the flags of the recipe's own script besides, which win over the recipe's.
"""

import cm_diffusers.engine.early  # not asked to look at the flags: most are another script's
import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

from torch import nn

from cm_diffusers.engine.cli import parse_words, run
from cm_diffusers.engine.recipes import flags_of
from cm_diffusers.errors import UserError
from cm_diffusers.models.probes import core_of
from cm_diffusers.tasks.plan import PlanConfig, count
from cm_diffusers.tasks.plan_networks import training_of
from cm_diffusers.tasks.plan_page import page
from cm_diffusers.tasks.plan_starts import Given, configs_of, own_words, script_of, start_of


CONFIGS = (PlanConfig,)
FOLDER = Path(__file__).parent


def load(stem: str) -> ModuleType:
    """A script beside this one."""
    path = FOLDER / f"{stem}.py"
    if not path.is_file():
        raise UserError(f"--script {stem} is no training script: give one such as distill_lcm.")
    spec = importlib.util.spec_from_file_location(f"planned_{stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(name: str) -> nn.Module | None:
    """The network that a recipe trains, on "meta"; None where there is none of that name."""
    recipe = FOLDER / "recipes" / f"{name}.args"
    if not recipe.is_file():
        return None
    given = configs_of(load(script_of(name, FOLDER)), ["--recipe", str(recipe)])
    return core_of(training_of(given, partial(start_of, trained=trained)).nets.student)


def parse(words: list[str]) -> tuple[PlanConfig, Given]:
    """The machines, and what the recipe's script is given."""
    own, others = own_words(words, PlanConfig)
    (config,) = parse_words(CONFIGS, __doc__, own)
    recipes = [said[-1] for name, said in flags_of(others) if name == "recipe"]
    if not recipes and config.script is None:
        raise UserError("--recipe is missing: give that of a training, or --script with its flags.")
    return config, configs_of(load(config.script or script_of(recipes[-1], FOLDER)), others)


def main() -> None:
    config, given = parse(sys.argv[1:])
    find = partial(start_of, trained=trained, shape=config.shape)
    print(page(count(training_of(given, find), given), config))


if __name__ == "__main__":
    run(main)
