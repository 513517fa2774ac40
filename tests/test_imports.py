"""cache <- predictors <- offload, and torch only where a tensor is touched."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cache", "predictors", "offload")
MODULES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# The rooms that have no business with tensors.
TORCH_FREE = ("costs", "decide", "simulation")
DECISIONS = [path for path in MODULES if path.parts[0] == "offload" and path.parts[1] in TORCH_FREE]


def imported(source: str, package: str = "") -> set[str]:
    """Full names of all that `source` imports, at any depth, relative ones inside `package`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            start = ".".join(parents[: len(parents) + 1 - node.level]) if node.level else ""
            module = ".".join(part for part in (start, node.module) if part)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def imports_of(path: Path) -> set[str]:
    return imported((ROOT / path).read_text(encoding="utf-8"), ".".join(path.parent.parts))


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def names_torch_cuda(source: str) -> bool:
    """Whether the code, not its comments, says `torch.cuda` or imports from it."""
    uses = any(
        isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda" for node in ast.walk(ast.parse(source))
    )
    return uses or any(f"{name}.".startswith("torch.cuda.") for name in imported(source))


def test_the_walk_sees_every_kind_of_import() -> None:
    source = "import a.b\ndef f():\n    from c.d import e\n    if 1: from . import g\n    from ..h import i\n"
    assert imported(source, "x.y") == {"a.b", "c.d.e", "x.y.g", "x.h.i"}
    assert names_torch_cuda("def f(): return torch.cuda.is_available()")
    assert names_torch_cuda("from torch import cuda")
    assert names_torch_cuda("from torch.cuda import Stream")
    assert not names_torch_cuda("x = torch.version.cuda  # torch.cuda")
    assert {path.parts[0] for path in MODULES} == set(PACKAGES)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_one_way(path: Path) -> None:
    used = tops(imports_of(path))
    if path.parts[0] == "cache":
        assert not used & {"predictors", "offload"}
        assert used <= set(sys.stdlib_module_names) | {"numpy", "cache"}
    if path.parts[0] == "predictors":
        assert "offload" not in used
    if path.as_posix() == "predictors/base.py":
        assert "torch" not in used


@pytest.mark.parametrize("path", DECISIONS, ids=str)
def test_decisions_know_no_tensors(path: Path) -> None:
    assert "torch" not in tops(imports_of(path))


def test_only_device_names_torch_cuda() -> None:
    naming = {str(path) for path in MODULES if names_torch_cuda((ROOT / path).read_text(encoding="utf-8"))}
    assert {Path(path).parent for path in naming} <= {Path("offload", "device")}


def modules_after(statement: str) -> set[str]:
    """Top-level packages that a fresh interpreter has imported after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert run.returncode == 0, run.stderr
    return tops(set(run.stdout.split()))


def test_importing_offload_is_light() -> None:
    loaded = modules_after("import offload")
    assert {"offload", "cache", "predictors"} <= loaded
    assert not loaded & {"torch", "transformers", "accelerate", "bitsandbytes"}


def test_replaying_presets_loads_no_torch() -> None:
    loaded = modules_after(
        "import offload.terminal.replay_tables; from offload.decide.presets import find_preset; find_preset('hobbit')"
    )
    assert not loaded & {"torch", "transformers"}


def test_the_cache_and_the_predictors_registry_load_without_torch() -> None:
    loaded = modules_after(
        "import cache.residency, cache.stats, cache.policy, predictors.base\n"
        "cache.policy.names(); predictors.base.names()"
    )
    assert not loaded & {"torch", "transformers", "offload"}
