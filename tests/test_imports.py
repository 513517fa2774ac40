"""The rooms of the house: who imports whom, who knows torch, and how long files and functions are.

`python tests/test_imports.py` prints what these tests look at.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable

import pytest
from house import (
    MODULES,
    PACKAGES,
    ROOT,
    arrows,
    circles,
    files,
    function_lengths,
    lengths,
    longest_chain,
    named,
    parsed,
    room,
    target,
    within,
)

# A package, or a room of offload/, imports only what stands to its left; `|` means neither sees the other.
RULE = """
    cache < predictors | costs < system < formats | decide | device < checkpoint < store < layers
          < engine | plan | talk | demo < assembly | traces | simulation < model
          < machine | quality | tuning < serve < terminal
"""
FLOOR = {room.strip(): float(floor) for floor, rooms in enumerate(RULE.split("<")) for room in rooms.split("|")}
FLOOR |= {
    "options": 0.5,  # leaves: they import `cache` alone, and every room may import them
    "stats": 0.5,
    "offload": FLOOR["serve"] - 0.5,  # offload/__init__.py hands out, late, what the rooms before `serve` offer
    "__main__": FLOOR["terminal"] + 0.5,
}

TORCH = {
    **dict.fromkeys(("device", "formats", "layers", "engine"), "holds tensors"),
    "checkpoint": "dtypes, and a model without weights",
    "store": "bytes from and for the disk",
    "plan": "runs a model without weights",
    "demo": "writes a checkpoint",
    "talk": "ids of tokens",
    "assembly": "a model's modules",
    "traces": "what routers say",
    "model": "ids of tokens, and a model's modules",
    "machine": "times products and copies",
    "quality": "logits, and what goes into a gate",
    "tuning": "ids of tokens",
}
"""Which rooms may import torch, and what for."""
TORCHES = ("accelerate", "bitsandbytes", "safetensors.torch", "torch", "transformers", "triton")
"""Torch, and what cannot do without it."""
TORCH_FREE = ("cache", "predictors", "costs", "decide", "simulation")
"""These load no torch either, through whatever they import."""

ONLY = {
    "typer": "terminal",
    "rich.table": "terminal",
    "torch.accelerator": "device",
    "torch.cuda": "device",
    **dict.fromkeys(("aiohttp", "fastapi", "flask", "http.server", "starlette", "uvicorn"), "serve"),
}
"""What one room alone may name."""

LONG_FUNCTIONS = {
    "offload/engine/fused/kernels.py _down": "kernel",
    "offload/engine/fused/kernels.py _gate_up": "kernel",
    "offload/engine/fused/product.py product": "kernel",
    "offload/formats/gpu/nested.py _linear": "kernel",
}
"""Functions of more than 60 lines, and why."""


def wrong_arrows() -> set[str]:
    """Every import against the rule, as "module -> what it imports"."""
    beyond = float("inf")
    wrong = {
        f"{module} -> {other}"
        for module, others in arrows().items()
        for other in others
        if room(module) != room(other) and FLOOR.get(room(other), beyond) >= FLOOR.get(room(module), beyond)
    }
    for module, path in MODULES.items():
        for name in named(parsed(path)):
            wrong.update(
                f"{module} -> {what}" for what, owner in ONLY.items() if within(name, what) and owner != room(module)
            )
            if room(module) not in TORCH and any(within(name, what) for what in TORCHES):
                wrong.add(f"{module} -> torch")
    return wrong


def right_arrows() -> dict[str, set[str]]:
    wrong = wrong_arrows()
    return {
        module: {other for other in others if f"{module} -> {other}" not in wrong}
        for module, others in arrows().items()
    }


def on_circles() -> set[str]:
    return {module for circle in circles(right_arrows()) for module in circle}


def long_files() -> dict[str, int]:
    return {path: count for path, count in lengths(*PACKAGES, "scripts", "tests").items() if count > 300}


def long_functions() -> dict[str, int]:
    return {name: count for name, count in function_lengths(*PACKAGES, "scripts").items() if count > 60}


def loaded_after(*statements: str) -> set[str]:
    """The packages that a fresh interpreter has imported after `statements`."""
    code = "\n".join([*statements, "import sys", "print(*sys.modules)"])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return {name.partition(".")[0] for name in run.stdout.split()}


def test_the_walk_sees_every_kind_of_import() -> None:
    source = "import a.b\ndef f():\n    from c.d import e\n    if TYPE_CHECKING: from g import h\n    torch.cuda.x"
    assert named(ast.parse(source)) == {"a.b", "c.d.e", "g.h", "torch.cuda"}
    assert (target("cache.types.ExpertKey"), target("numpy.typing")) == ("cache.types", None)
    rooms = [room(module) for module in ("cache.types", "offload", "offload.model", "offload.decide.split")]
    assert rooms == ["cache", "offload", "model", "decide"]
    assert within("torch.cuda.Stream", "torch.cuda")
    assert not within("torch.cudart", "torch.cuda")
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [("b", "c")]
    assert longest_chain({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == ["a", "b", "c"]


def test_every_import_keeps_to_the_rule() -> None:
    assert not wrong_arrows()


def test_no_files_import_each_other() -> None:
    assert not on_circles()


def test_the_cache_needs_numpy_alone() -> None:
    used = {name.partition(".")[0] for path in files("cache") for name in named(parsed(path))}
    assert used <= set(sys.stdlib_module_names) | {"numpy", "cache"}


def test_every_folder_says_what_lives_there() -> None:
    folders = {path.parent for path in MODULES.values()}
    assert not [folder for folder in folders if not ast.get_docstring(parsed(folder / "__init__.py"))]


def test_no_two_files_of_tests_have_one_name() -> None:
    """Pytest imports them by it: the second one could not be, in a run of both folders."""
    names = [path.name for path in files("tests") if path.name not in ("conftest.py", "__init__.py")]
    assert sorted(names) == sorted(set(names))


def test_no_file_is_too_long() -> None:
    assert not long_files()


def test_no_function_is_too_long() -> None:
    assert set(long_functions()) == set(LONG_FUNCTIONS)


@pytest.mark.parametrize("name", TORCH_FREE)
def test_decisions_load_no_torch(name: str) -> None:
    modules = [module for module in MODULES if room(module) == name]
    assert modules
    assert not loaded_after(*(f"import {module}" for module in modules)) & {"torch", "transformers"}


def test_replaying_presets_loads_no_torch() -> None:
    find = "from offload.decide.presets import find_preset; find_preset('hobbit')"
    assert not loaded_after("import offload.terminal.replay_tables", find) & {"torch", "transformers"}


def test_parts_are_found_by_name_without_torch_or_offload() -> None:
    loaded = loaded_after("import cache.policy, predictors.base", "cache.policy.names(); predictors.base.names()")
    assert not loaded & {"torch", "transformers", "offload"}


def test_importing_offload_is_light() -> None:
    loaded = loaded_after("import offload")
    assert {"offload", "cache", "predictors"} <= loaded
    assert not loaded & {"torch", "transformers", "accelerate", "bitsandbytes", "triton"}


def test_fast_tests_load_no_torch() -> None:
    """Those of `make test-fast`: so they are quick to start, and say what decisions do without a model."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (fast,) = re.findall("^FAST := (.*)$", makefile, re.MULTILINE)
    paths = [str(ROOT / path) for path in fast.split()]
    collect = f"assert pytest.main(['--collect-only', '-q', *{paths}]) == 0"
    assert not loaded_after("import pytest", collect) & {"torch", "transformers"}


def report() -> str:
    """Rooms and arrows, what breaks the rule, the longest chain of imports, and what is long."""
    between: dict[str, set[str]] = defaultdict(set)
    for module, others in arrows().items():
        between[room(module)] |= {room(other) for other in others} - {room(module)}
    rooms = sorted(between, key=lambda name: FLOOR.get(name, 0))
    lines = [f"{len(MODULES)} files, {len(rooms)} rooms, {sum(map(len, between.values()))} arrows between rooms:"]
    lines += [
        f"  {name}: {', '.join(other for other in rooms if other in between[name]) or 'nothing'}" for name in rooms
    ]
    lines += _listed("imports against the rule", sorted(wrong_arrows()))
    lines += _listed("files on a circle of imports", sorted(on_circles()))
    if not on_circles():
        chain = longest_chain(right_arrows())
        lines += _listed(f"longest chain of imports: {len(chain)} files", chain)
    lines += _listed("files of more than 300 lines", [f"{path}: {count}" for path, count in long_files().items()])
    functions = [f"{name}: {count}, {LONG_FUNCTIONS.get(name, '')}" for name, count in long_functions().items()]
    lines += _listed("functions of more than 60 lines", functions)
    return "\n".join(lines)


def _listed(title: str, things: Iterable[str]) -> list[str]:
    return [title, *(f"  {thing}" for thing in things or ["none"])]


if __name__ == "__main__":
    print(report())
