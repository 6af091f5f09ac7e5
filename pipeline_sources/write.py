"""Writes the files of `pipelines/` that travel alone from the sources beside this command: `make single-files`.

A source imports what it shares, from `shared/` or from cm_diffusers. Its single file holds these definitions themselves,
each after all that it uses, and nothing else of the modules they come from. It is formatted as ruff would.
"""

import ast
import sys
from functools import cache
from pathlib import Path


HERE = Path(__file__).resolve().parent
SRC, TARGET = HERE.parent / "src", HERE.parent / "pipelines"
SOURCES = [path for path in sorted(HERE.glob("*.py")) if path != Path(__file__).resolve()]
NOTE = "# Written by `make single-files` in cm_diffusers, from pipeline_sources/{}: change that, not this."
WIDTH = 119
Import = tuple[str, str | None]  # a module and a name in it, None for the module itself


class Source:
    """A module.

    Attributes:
        body: Its statements.
        imports: Where each name comes from that it imports.
        definitions: The statement that defines each of its own names.
    """

    def __init__(self, path: Path) -> None:
        text = path.read_text("utf-8")
        self.path, self.lines, self.body = path, text.splitlines(), ast.parse(text).body
        self.definitions = {name: node for node in self.body if (name := _defined(node))}
        self.imports: dict[str, Import] = {}
        for node in self.body:
            if isinstance(node, ast.Import):
                self.imports |= {one.asname or one.name: (one.name, None) for one in node.names}
            elif isinstance(node, ast.ImportFrom):
                module = "." * node.level + node.module
                self.imports |= {one.asname or one.name: (module, one.name) for one in node.names}

    def text(self, node: ast.stmt) -> str:
        """A statement as it is written, with the comments right above it."""
        first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))]) - 1
        while first and self.lines[first - 1].startswith("#"):
            first -= 1
        return "\n".join(self.lines[first : node.end_lineno])

    def ours(self, module: str) -> Path | None:
        """The file of a module that does not travel; None for one that a single file imports."""
        if module.startswith("."):
            return self.path.parent.joinpath(*module[1:].split(".")).with_suffix(".py")
        return SRC.joinpath(*module.split(".")).with_suffix(".py") if module.startswith("cm_diffusers.") else None


source = cache(Source)


class SingleFile:
    """What the single file of a source holds; as a string, the file."""

    def __init__(self, path: Path) -> None:
        main = source(path)
        docstring, *body = (node for node in main.body if not isinstance(node, ast.Import | ast.ImportFrom))
        self.head = f"{NOTE.format(path.name)}\n{main.text(docstring)}"
        self.origins: dict[str, Import | Path] = dict.fromkeys(main.definitions, path)  # of each name in the file
        self.imports: dict[str, Import] = {}
        self.pieces: list[tuple[ast.stmt, str]] = []
        for node in body:
            self._take_used(main, node, main.imports)
        self.pieces += [(node, main.text(node)) for node in body]

    def __str__(self) -> str:
        text, before = f"{self.head}\n\n{_import_lines(self.imports)}\n", True
        for node, piece in self.pieces:
            block = isinstance(node, ast.FunctionDef | ast.ClassDef)
            text += ("\n\n" if block or before else "") + piece + "\n"
            before = block
        return text

    def _take_used(self, module: Source, node: ast.stmt, among: dict) -> None:
        used = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
        for name in sorted(used & among.keys()):
            self._take(module, name)

    def _take(self, module: Source, name: str) -> None:
        """Takes in a name of a module, after all that its definition uses."""
        if name in module.imports:
            where, there = module.imports[name]
            if ours := module.ours(where):
                self._take(source(ours), name)
            elif self._is_new(name, (where, there), module):
                self.imports[name] = (where, there)
        elif self._is_new(name, module.path, module):
            node = module.definitions[name]
            self._take_used(module, node, module.imports | module.definitions)
            self.pieces.append((node, module.text(node)))

    def _is_new(self, name: str, origin: Import | Path, module: Source) -> bool:
        """
        Raises:
            ValueError: The module does not define it, or something else has this name in the file.
        """
        if isinstance(origin, Path) and name not in module.definitions:
            raise ValueError(f"{module.path.name} defines no {name}; import what it defines, by its own name.")
        known = name in self.origins
        if self.origins.setdefault(name, origin) != origin:
            raise ValueError(f"{name} of {module.path.name} has the name of something else; rename one of them.")
        return not known


def _defined(node: ast.stmt) -> str | None:
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
            return name
        case ast.Assign(targets=[ast.Name(id=name)]):
            return name
    return None


def _import_lines(imports: dict[str, Import]) -> str:
    """The standard library, then the others; in each, modules before names of modules."""
    lines, members = [], {}
    for name, (module, there) in imports.items():
        if there is None:
            lines.append((_is_other(module), False, f"import {module}" + (f" as {name}" if name != module else "")))
        else:
            members.setdefault(module, []).append(name if name == there else f"{there} as {name}")
    lines += [(_is_other(module), True, _from(module, names)) for module, names in members.items()]
    sections = [[line for other, _, line in sorted(lines) if other is wanted] for wanted in (False, True)]
    return "\n\n".join("\n".join(section) for section in sections if section)


def _is_other(module: str) -> bool:
    return module.split(".")[0] not in sys.stdlib_module_names


def _from(module: str, names: list[str]) -> str:
    """Constants first, then classes, then functions."""
    names = sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name.lower()))
    line = f"from {module} import {', '.join(names)}"
    wrapped = [f"from {module} import (", *(f"    {name}," for name in names), ")"]
    return line if len(line) <= WIDTH else "\n".join(wrapped)


if __name__ == "__main__":
    for path in SOURCES:
        (TARGET / path.name).write_text(str(SingleFile(path)), "utf-8")
