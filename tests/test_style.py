"""The architecture as assertions: sizes, imports, one class per file, and a docs/papers.md that keeps its promises."""

import ast
import importlib.util
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import diffusers.pipelines
import pytest

from cm_diffusers.engine.cli import parse_configs


ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "cm_diffusers"
SOURCES = sorted(SRC.rglob("*.py"))
SCRIPTS = sorted((ROOT / "training").glob("*.py"))
RECIPES = sorted((ROOT / "training" / "recipes").glob("*.args"))
OBJECTIVES = sorted(p for p in (SRC / "objectives").glob("*.py") if p.stem != "__init__")
PIPELINES = sorted([*(SRC / "pipelines").glob("pipeline_*.py"), *(ROOT / "pipelines").glob("*.py")])
SCHEDULERS = sorted((SRC / "schedulers").glob("scheduling_*.py"))
SELF_CONTAINED = sorted((ROOT / "pipelines").glob("*.py"))
# Arrows point to the left: a wing imports those before it, never one after it.
WINGS = """
    diffusion models schedulers engine policy pipelines data objectives evaluation rewards publishing combining tasks
""".split()
NOUNS = {"types", "record", "measured", "errors", "markdown", "places", "pixels", "ranges", "quiet", "extras"}
ALLOWED = {"torch", "numpy", "diffusers", "transformers", "huggingface_hub", *sys.stdlib_module_names}
PAPERS = (ROOT / "docs" / "papers.md").read_text()
ROWS = [line for line in PAPERS.splitlines() if line.startswith("|")]
TEXT = {".py", ".args", ".md", ".toml", ".json", ".txt", ".yml", ".yaml"}
# Written so that no pattern matches its own source.
FORBIDDEN = re.compile(
    r"(?<![\w.}])/(?:work|root|home)\b/?|^\s*(?:import|from)\s+(?:pickle|dill)\b|torch\.load\(|allow_pickle\s*=\s*True",
    re.MULTILINE,
)


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda p: str(p.relative_to(ROOT)))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def lengths(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def imports(path: Path) -> Iterator[str]:
    """Full dotted names, relative ones with their leading dots: `.lcm`, `torch.nn`."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = "." * node.level + (node.module or "")
            yield from (f"{stem}{'' if stem.endswith('.') else '.'}{alias.name}" for alias in node.names)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def script_of(recipe: Path) -> Path:
    """The script in the docs/papers.md row that names the recipe."""
    rows = [row for row in ROWS if f"recipes/{recipe.name}`" in row]
    assert len(rows) == 1, f"{recipe.name} must be named in exactly one row of docs/papers.md, found {len(rows)}"
    return ROOT / re.search(r"`(training/\w+\.py)`", rows[0]).group(1)


@each(SOURCES)
def test_modules_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300
    exempt = {"__call__"} if path in PIPELINES else set()
    assert {name: n for name, n in lengths(path) if n > 60 and name not in exempt} == {}


def test_functions_are_small_as_a_rule() -> None:
    sizes = sorted(n for path in SOURCES for _, n in lengths(path))
    assert len(sizes) > 1
    assert statistics.median(sizes) <= 8
    assert statistics.quantiles(sizes, n=10)[-1] <= 30


def floor(name: str) -> int:
    """0 for the nouns, then the wings in their order, then what the package shows to the outside."""
    return 0 if name in NOUNS else WINGS.index(name) + 1 if name in WINGS else len(WINGS) + 1


@each([*SOURCES, *SCRIPTS])
def test_what_a_user_can_mend_is_a_user_error(path: Path) -> None:
    """A ValueError from inside a library is none of it: scripts print only the sentences of ours."""
    raised = [node.exc for node in ast.walk(tree(path)) if isinstance(node, ast.Raise)]
    assert [
        call.lineno for call in raised if isinstance(call, ast.Call) and ast.unparse(call.func) == "ValueError"
    ] == []


@each(SOURCES)
def test_wings_import_only_those_before_them(path: Path) -> None:
    mine = floor(path.relative_to(SRC).parts[0].removesuffix(".py"))
    ours = [name.split(".")[1] for name in imports(path) if name.split(".")[0] == "cm_diffusers" and "." in name]
    assert [name for name in ours if floor(name) > mine] == []
    assert mine or set(ours) <= {"errors"}  # the nouns import nothing else of ours


def test_every_module_has_a_wing() -> None:
    assert {p.name for p in SRC.iterdir() if p.is_dir() and p.name != "__pycache__"} == set(WINGS)
    assert {p.stem for p in SRC.glob("*.py")} == NOUNS | {"__init__", "registration", "frame_noise"}


@each(OBJECTIVES)
def test_an_objective_knows_no_other(path: Path) -> None:
    sibling = re.compile(r"^\.\w|^(\.\.|cm_diffusers\.)objectives\b|Objective$")
    assert [name for name in imports(path) if sibling.search(name)] == []


@each(SELF_CONTAINED)
def test_pipelines_that_travel_stand_alone(path: Path) -> None:
    assert {name for name in imports(path) if name.split(".")[0] not in ALLOWED} == set()


@each(SCHEDULERS)
def test_a_scheduler_shares_only_mathematics(path: Path) -> None:
    shared = re.compile(r"cm_diffusers\.(diffusion\.(preconditioning|process|times|trigflow)|errors|schedulers)\.")
    own = {name for name in imports(path) if name.split(".")[0] not in ALLOWED}
    assert {name for name in own if not shared.match(name)} == set()


@each(PIPELINES)
def test_one_pipeline_per_file(path: Path) -> None:
    classes = [node for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)]
    assert len([c for c in classes if any(ast.unparse(base).endswith("Pipeline") for base in c.bases)]) == 1


def test_no_folder_is_taken_for_a_diffusers_pipeline() -> None:
    folders = {p.parent.name for p in SOURCES}
    assert {name for name in folders if hasattr(diffusers.pipelines, name)} == set()


@each(SCRIPTS)
def test_a_script_is_wiring(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 80


@each([p for p in SCRIPTS if "parse_configs" in p.read_text()])
def test_config_fields_do_not_collide(path: Path) -> None:
    names = Counter(f.name for config in load(path).CONFIGS for f in fields(config))
    assert {name: n for name, n in names.items() if n > 1} == {}


@each(RECIPES)
def test_recipe_parses_with_its_script(path: Path) -> None:
    configs = load(script_of(path)).CONFIGS
    assert tuple(map(type, parse_configs(configs, "", ["--recipe", str(path)]))) == configs


@each(OBJECTIVES)
def test_every_objective_has_its_paper(path: Path) -> None:
    assert f"`objectives/{path.name}`" in PAPERS


@pytest.mark.parametrize("page", ["docs/papers.md", "docs/wishes.md"])
def test_pages_name_files_that_exist(page: str) -> None:
    named = re.findall(r"`([a-z][\w/.]*(?:\.py|\.args|\.md|/))`", (ROOT / page).read_text())
    roots = (ROOT, SRC, ROOT / "training")
    assert {name for name in named if not any((root / name).exists() for root in roots)} == set()


@each([p for p in SCRIPTS if p.stem.startswith(("distill_", "train_"))])
def test_every_training_script_has_its_paper(path: Path) -> None:
    assert f"`training/{path.name}`" in PAPERS


# Of these only JSON and texts are read; our own pipelines ask for safetensors themselves.
NO_WEIGHTS = re.compile(r"(Tokenizer|Processor|Config|Scheduler)$|^Consistency\w*Pipeline$|^(super\(\)|cls)$")


def loads_anything(path: Path) -> Iterator[str]:
    """Calls that would open a pickle where there are no safetensors."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            said = {f"{word.arg or '**'}={ast.unparse(word.value)}" for word in node.keywords}
            loads = node.func.attr in ("from_pretrained", "load_lora_weights", "load_lora_adapter")
            kept = said & {"use_safetensors=True", "**=LOADING", "state_dict=tensors"}
            if loads and not kept and not NO_WEIGHTS.search(ast.unparse(node.func.value)):
                yield ast.unparse(node)


@each([*SOURCES, *SCRIPTS, *sorted((ROOT / "benchmarks").glob("*.py"))])
def test_no_pickle_is_opened(path: Path) -> None:
    with_default = "MotionAdapter.from_pretrained(source, dtype=dtype, use_safetensors=use_safetensors, **options)"
    of_class = "student_class(stock).from_pretrained(source, **kwargs)"
    allowed = {with_default, of_class}  # of True
    assert set(loads_anything(path)) - allowed == set()


@pytest.mark.parametrize("folder", ["src", "tests", "training", "docs", "benchmarks", "pipelines"])
def test_no_machine_paths_and_no_pickle(folder: str) -> None:
    files = [p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix in TEXT and "_build" not in p.parts]
    found = {str(p.relative_to(ROOT)): match.group() for p in files if (match := FORBIDDEN.search(p.read_text()))}
    assert found == {}
