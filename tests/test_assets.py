"""What is bundled: locked file by file, light enough to be copied anywhere, and each with the command that makes it."""

import hashlib
import json
import re
import runpy
import shlex
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
from scripts import script

from cm_diffusers.engine.cli import parse_configs
from cm_diffusers.models.families.unet import LCM_LORA_TARGETS
from cm_diffusers.places import public


ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "assets"
README = (ASSETS / "README.md").read_text("utf-8")
BLOCK, MOST = 4096, 50 * 2**20  # bytes: what a file takes is a multiple of the first
REMADE = runpy.run_path(str(ROOT / "benchmarks" / "update_docs.py"))["REMADE"]
STUDY = {"runs/studies/animatelcm/LoRA-0/lora": "runs/animatelcm_lora_fashion/lora"}  # which made the bundled student
NAMED = {
    f"training/recipes/{p.name}": p.name for p in (ROOT / "training" / "recipes").glob("*.json")
}  # by name, since
FOLDERS = [
    *(path.name for path in sorted(ASSETS.iterdir()) if path.is_dir() and path.name != "results"),
    *(f"results/{path.name}" for path in sorted((ASSETS / "results").iterdir())),
]


def test_the_lock_is_of_the_files() -> None:
    lines = (ROOT / "assets.lock").read_text("utf-8").splitlines()
    locked = {path: (digest, int(size)) for digest, size, path in (line.split(" ", 2) for line in lines)}
    assert len(locked) == len(lines)
    files = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in ASSETS.rglob("*") if path.is_file()}
    assert locked == {path: (hashlib.sha256(content).hexdigest(), len(content)) for path, content in files.items()}


def test_the_tracked_tree_is_light() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("only git knows what is tracked, and this is no checkout or there is no git")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"git does not say what is tracked: {listed.stderr}")
    sizes = {name: (ROOT / name).stat().st_size for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
    assert len(sizes) > 500
    assert sum(-(-size // BLOCK) * BLOCK for size in sizes.values()) <= MOST


def commands() -> dict[str, list[list[str]]]:
    """The words of the commands of the README by the folder they make, which a comment names above them."""
    (block,) = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    found, folder = {}, None
    for line in block.splitlines():
        if line.startswith("#"):
            folder = re.match(r"# ([\w/]+)", line)[1]
        else:
            found.setdefault(folder, []).append(shlex.split(line))
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_command_is_said_to_make_it(folder: str) -> None:
    made = commands()[folder]
    assert "python" in [words[0] for words in made]
    files = {word for words in made for word in words if word.endswith((".py", ".args", ".toml"))}
    assert files
    assert {file for file in files if not (ROOT / file).is_file()} == set()
    assert f"`{folder.split('/')[0]}/`" in README


def test_the_readme_says_which_weights_are_elsewhere() -> None:
    configured = {path.relative_to(ASSETS).parts[0] for path in ASSETS.rglob("config.json")}
    weighing = {path.relative_to(ASSETS).parts[0] for path in ASSETS.rglob("*.safetensors")}
    assert configured - weighing == set(REMADE)
    rows = dict(re.findall(r"^\| `(\w+)/` \| .* \| (.*) \|$", README, re.MULTILINE))
    assert {folder: f"`{place}`" for folder, place in REMADE.items()}.items() <= rows.items()
    assert {folder for folder, where in rows.items() if where == "here"} == weighing


@pytest.mark.parametrize("folder", [path.parent.name for path in sorted(ASSETS.glob("*/training.json"))])
def test_the_command_is_that_of_the_record(folder: str) -> None:
    """Its settings are those the bundled model was made with, but for where weights lie that are not here."""
    _, path, *flags = commands()[folder][-1]
    configs = parse_configs(script(Path(path).stem).CONFIGS, "", flags)
    given = {key: public(value) for config in configs for key, value in asdict(config).items()}
    places = {f"assets/{name}": place for name, place in REMADE.items()} | STUDY | NAMED
    recorded = json.loads((ASSETS / folder / "training.json").read_text("utf-8"))["settings"]
    recorded.pop("validation_nfe", None)  # of grids alone; its default has changed since
    if recorded.get("lora_target_modules") == list(LCM_LORA_TARGETS):  # which are not spelled out any more
        recorded["lora_target_modules"] = None
    moved = {key: places.get(value, value) if isinstance(value, str) else value for key, value in recorded.items()}
    assert {key: given[key] for key in moved} == moved
    if folder in REMADE:
        (train,) = (config for config in configs if hasattr(config, "output_dir"))
        assert Path(REMADE[folder]).parent == Path(train.output_dir)
