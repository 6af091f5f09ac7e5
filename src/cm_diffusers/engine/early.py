"""Answers --help and refuses wrong flags before the imports that take seconds; a script imports this first.

The flags are read from the sources: of a script's `CONFIGS` and of the modules that it names, only the statements are
executed that define the dataclasses' fields.
"""

import ast
import sys
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


PACKAGE = Path(__file__).parents[1]


class Source:
    """A module's file, of which each name is defined when it is asked for.

    Args:
        path: The file.
        name: The module's.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.tree = ast.parse(path.read_text("utf-8"), path)
        self.statements = {bound: node for node in self.tree.body for bound in _bound(node)}
        self.namespace = {"__name__": name}

    def get(self, name: str) -> object:
        """The value of a name that the module binds; classes come without their methods."""
        if name not in self.namespace:
            node = self.statements[name]
            if isinstance(node, ast.ImportFrom) and node.module.startswith("cm_diffusers."):
                (original,) = (alias.name for alias in node.names if name in (alias.name, alias.asname))
                self.namespace[name] = _source(node.module).get(original)
            else:
                self._execute(_without_methods(node), name)
        return self.namespace[name]

    def _execute(self, node: ast.stmt, name: str) -> None:
        used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        for other in used & self.statements.keys() - {name}:
            self.get(other)
        exec(compile(ast.Module([node], []), self.namespace["__name__"], "exec"), self.namespace)


@cache
def _source(module: str) -> Source:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return Source(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"), module)


def _bound(node: ast.stmt) -> list[str]:
    """The names that a statement at the top of a module binds."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    return [part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]


def _without_methods(node: ast.stmt) -> ast.stmt:
    if isinstance(node, ast.ClassDef):
        node.body = [part for part in node.body if not isinstance(part, ast.FunctionDef)] or [ast.Pass()]
        ast.fix_missing_locations(node)
    return node


def _import_alone(module: str) -> None:
    """Import a module of a package, but not the package, which takes a second of its own."""
    package, _, stem = module.partition(".")
    spec = spec_from_file_location(module, Path(find_spec(package).origin).with_name(f"{stem}.py"))
    sys.modules[module] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[module])


def answer(script: Path) -> None:
    """End the process with the help or with what is wrong with the flags, or else do nothing.

    Args:
        script: Its `CONFIGS` are the dataclasses of its flags.
    """
    source = Source(script, "__main__")
    if "transformers" not in sys.modules:
        _import_alone("transformers.hf_argparser")
    from cm_diffusers.engine.cli import in_one_sentence, parse_words

    with in_one_sentence():
        parse_words(source.get("CONFIGS"), ast.get_docstring(source.tree, clean=False))


def _asks(main: ModuleType) -> bool:
    """Whether the running script imports this module: another may import such a script, and workers do by another name."""
    path = Path(getattr(main, "__file__", None) or ".")
    is_script = main.__name__ == "__main__" and path.suffix == ".py" and path.is_file()
    return is_script and "\nimport cm_diffusers.engine.early\n" in path.read_text("utf-8")


if _asks(sys.modules["__main__"]):
    answer(Path(sys.modules["__main__"].__file__))
