"""What the files of the project import, and how long they are: what `test_imports.py` looks at. Knows no rule."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

Arrows = Mapping[str, set[str]]
"""Which modules each module imports."""

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cache", "predictors", "offload")


def files(*folders: str) -> list[Path]:
    """All Python files in `folders`, as paths from the root of the project."""
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))


MODULES = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in files(*PACKAGES)}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def room(module: str) -> str:
    """The package, or the room of offload/ (a folder, or a file beside the folders), that a module stands in."""
    package, _, inner = module.partition(".")
    return inner.partition(".")[0] if package == "offload" and inner else package


def named(tree: ast.Module) -> set[str]:
    """Full names of all that is imported, at any depth and for types alone too, and `torch.x` where it is used."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            found.add(f"torch.{node.attr}")
    return found


def within(name: str, package: str) -> bool:
    """Whether a full name is `package`, or lies in it."""
    return f"{name}.".startswith(f"{package}.")


def target(name: str) -> str | None:
    """The module of ours that a full name lies in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def arrows() -> dict[str, set[str]]:
    """Which of our modules each of them imports."""
    found = {module: {target(name) for name in named(parsed(path))} for module, path in MODULES.items()}
    return {module: {name for name in names if name and name != module} for module, names in found.items()}


def circles(graph: Arrows) -> list[list[str]]:
    """The groups of modules that import each other, around however many corners."""
    reach = {module: _reached(graph, module) for module in graph}
    return sorted(
        {tuple(sorted(m for m in reach[module] if module in reach[m])) for module in graph if module in reach[module]}
    )


def longest_chain(graph: Arrows) -> list[str]:
    """The longest way from a module to what it imports, to what that imports, and so on. There must be no circle."""
    chains: dict[str, list[str]] = {}
    for module in TopologicalSorter(graph).static_order():
        chains[module] = [module, *max((chains[other] for other in sorted(graph[module])), key=len, default=[])]
    return max(chains.values(), key=len)


def lengths(*folders: str) -> dict[str, int]:
    """How many lines each file in `folders` has."""
    return {path.as_posix(): len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in files(*folders)}


def function_lengths(*folders: str) -> dict[str, int]:
    """How many lines each function has, docstring included and decorators not, as "file function"."""
    return dict(_functions(*folders))


def _functions(*folders: str) -> Iterator[tuple[str, int]]:
    for path in files(*folders):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.as_posix()} {node.name}", (node.end_lineno or node.lineno) - node.lineno + 1


def _reached(graph: Arrows, module: str) -> set[str]:
    reached: set[str] = set()
    ahead = [module]
    while ahead:
        fresh = graph[ahead.pop()] - reached
        reached |= fresh
        ahead += fresh
    return reached
