"""Small models, and scripts run as their users run them, for the tests of scripts."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cache.traces.trace import Trace
from scripts.bench import cgroup
from scripts.bench.families import FAMILIES, Family

ROOT = Path(cgroup.__file__).parents[2]
NO_CGROUP = cgroup.unavailable()
needs_cgroup = pytest.mark.skipif(NO_CGROUP is not None, reason=f"no memory cgroup: {NO_CGROUP}")
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


def tiny(name: str, **changes: object) -> Family:
    """The family's layout with small dimensions."""
    small: dict[str, object] = {
        "hidden": 64,
        "heads": 4,
        "kv_heads": 4 if name == "olmoe" else 2,
        "head_dim": 16,
        "intermediate": 32,
        "experts": 8,
        "top_k": 2,
        "layers": 2,
        "vocab": 128,
        "token_ids": {},
    }
    return replace(FAMILIES[name], **(small | changes))  # type: ignore[arg-type]


def trace_of_three_layers(path: Path) -> None:
    """100 tokens in two sequences, two of eight experts each."""
    rng = random.Random(0)
    experts = [[rng.sample(range(8), 2) for _ in range(3)] for _ in range(100)]
    Trace.from_arrays(experts, [[[0.6, 0.4]] * 3] * 100, [0, 60, 100], num_experts=8).write(path)


def run_benchmark(name: str, *arguments: object) -> dict[str, Any]:
    """The JSON line that the benchmark prints last."""
    script = ROOT / "scripts" / f"{name}.py"
    done = subprocess.run([sys.executable, script, *map(str, arguments)], stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == ("peers" if name == "peers/bench" else Path(name).name)
    assert result["machine"]["cores"] >= 1
    return result
