"""Files of flags: where they lie, and how they give way to the command line."""

import logging
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from cm_diffusers.errors import UserError, read_text, readable


logger = logging.getLogger(__name__)

# What there is one of: with one on the command line, the recipe's other ones go, and the flags that belong to them.
SOURCES = {
    "train_data_dir": "",
    "dataset_name": "dataset_config_name",
    "train_shards_path_or_url": "",
    "prompts_file": "generated_samples generation_steps generation_guidance_scale",
    "moving_articles": "num_clips",
}
# What acts on images that are there, not on those that a teacher samples.
OF_IMAGES = """
    dataset_split image_column interpolation_type center_crop random_flip aspect_ratio_buckets bucket_step bucket_max_ratio
    streaming shuffle_buffer_size max_train_samples cache_dir num_crops vae_dtype sample_stride num_starts video_column
"""
STAGES = ("lr_warmup_steps", "lr_cooldown_steps")


def with_recipes(argv: Sequence[str] | None) -> list[str]:
    """The words of the recipes, read as a shell would, then those of the command line.

    A source of data on the command line takes the place of a recipe's. Where `--max_train_steps` there is less than a
    recipe's warm-up and cooldown, they shrink with it, in proportion to the recipe's own steps.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", action="append", default=[])
    found, rest = parser.parse_known_args(argv)
    recipe = flags_of([word for name in found.recipe for word in _words(name)])
    given = {name for name, _ in flags_of(rest)}
    recipe = [(name, words) for name, words in recipe if name not in _superseded(given)]
    return [word for _, words in _scaled(recipe, flags_of(rest)) for word in words] + rest


def _words(recipe: str) -> list[str]:
    path = shipped("--recipe", recipe, ".args")
    with readable(f"--recipe {recipe}"):
        return shlex.split(read_text(path), comments=True)


def flags_of(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag's name, and its words with it."""
    found = []
    for word in words:
        if word.startswith("--") or not found:
            found.append((word[2:].partition("=")[0].replace("-", "_"), []))
        found[-1][1].append(word)
    return found


def _superseded(given: set[str]) -> set[str]:
    """Flags of a recipe that make way for the source of data that is given."""
    if not given & SOURCES.keys():
        return set()
    others = SOURCES.keys() - given
    names = {name for other in others for name in (other, *SOURCES[other].split())}
    return names | (set(OF_IMAGES.split()) if "prompts_file" in given else set())


def _scaled(recipe: list[tuple[str, list[str]]], given: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    theirs, ours = ({name: words[-1].partition("=")[2] or words[-1] for name, words in one} for one in (recipe, given))
    numbers = [theirs.get("max_train_steps", ""), ours.get("max_train_steps", "")]
    stages = {
        name: int(theirs[name]) for name in STAGES if name in theirs and name not in ours and theirs[name].isdecimal()
    }
    if not all(map(str.isdecimal, numbers)) or not stages or sum(stages.values()) <= int(numbers[1]):
        return recipe
    whole, steps = map(int, numbers)
    shrunk = {name: number * steps // whole for name, number in stages.items()} if steps < whole else {}
    for name, number in shrunk.items():
        logger.info(
            "--%s is %d instead of the recipe's %d, as --max_train_steps is %d.", name, number, stages[name], steps
        )
    return [(name, [f"--{name}", str(shrunk[name])] if name in shrunk else words) for name, words in recipe]


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
    places = (Path(name).expanduser(), folder / name, folder / f"{name}{suffix}")
    if found := next((place for place in places if place.is_file()), None):
        return found
    names = (path.stem for path in folder.glob(f"*{suffix}"))
    close = ", ".join(get_close_matches(Path(name).stem, names, cutoff=0.5))
    raise UserError(
        f"{flag} {name}: there is no such file and none of that name in the folder recipes beside the script; "
        + (f"close to it: {close}." if close else "give the path of one.")
    )
