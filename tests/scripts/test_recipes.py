"""docs/architecture.md shows how to add a part, a command and a bench script: its examples work as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = re.compile(r"`(\w+)\.py`\s+in\s+`[\w/]+/`:\n\n```python\n(.*?)```", re.DOTALL)
USES = {
    "mru": """
        from synthetic import zipf_markov
        from cache.counting.counting import count
        mru, lru = (count(zipf_markov(), name, [[8] * 4])[0].misses for name in ("mru", "lru"))
        assert mru > lru, (mru, lru)
    """,
    "deep": """
        from cache.quota import make_quota
        assert make_quota("deep", 3, 8).slots(12) == [2, 4, 6]
    """,
    "again": """
        from synthetic import zipf_markov
        from predictors.base import make_predictor
        from predictors.evaluate import evaluate
        trace = zipf_markov()
        made = make_predictor("again", trace.num_layers, trace.num_experts)
        assert evaluate(made, trace, 2).as_dict()
    """,
    "few": """
        from offload.decide.schedulers.base import Costs, Load, make_scheduler
        costs = Costs(gpu_s=lambda tokens: 1.0, cpu_s=lambda tokens: 1.0, copy_s=1.0)
        found = make_scheduler("few(most=2)").assign([Load(1, True), Load(2, False), Load(3, False)], costs)
        assert (found.gpu, found.cpu, found.copied) == ((0, 2), (1,), (2,))
    """,
    "whole": """
        from math import inf
        from offload.decide.schedulers.base import Costs, Load, make_scheduler
        costs = Costs(gpu_s=lambda tokens: 1.0, cpu_s=lambda tokens: 1.0, copy_s=1.0)
        options = Load(1, False, precision=1, loss=0.2), Load(1, False)
        left_out = Load(1, True, host_s=inf, loss=0.5, left_out=True, options=(Load(1, False, host_s=inf),))
        loads = [Load(1, True), Load(1, False, precision=2, loss=0.3, options=options), left_out]
        found = make_scheduler("whole").serve(loads, costs)
        assert (found.gpu, found.cpu, found.copied, found.served) == ((0, 2), (1,), (2,), {1: 1, 2: 0})
    """,
    "half": """
        from cache.types import ExpertKey
        from offload.decide.fallbacks.base import Candidate, make_fallback
        missing = [Candidate(ExpertKey(0, e), 0.3, 0.0, 0, None, (1.0, 0.5)) for e in range(3)]
        choices = make_fallback("half", 2, 4, 2).choose(None, missing, 0.0)
        assert [choice.precision for choice in choices] == [1, 0, 0]
    """,
    "shape": """
        from pathlib import Path
        from tempfile import TemporaryDirectory
        from synthetic import zipf_markov
        with TemporaryDirectory() as folder:
            zipf_markov().write(Path(folder, "t.safetensors"))
            shape(Path(folder, "t.safetensors"), json_output=True)
    """,
    "sum": """
        import runpy, sys
        assert benchmark(Args(numbers=1000, repetitions=2))["list"]["ms"] > 0
        sys.argv = ["sum.py", "--quick", "--numbers", "1000"]
        runpy.run_module("sum_example", run_name="__main__")
    """,
}


def examples() -> dict[str, str]:
    return dict(EXAMPLE.findall((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")))


def test_every_recipe_has_an_example() -> None:
    assert set(examples()) == set(USES)


@pytest.mark.parametrize("name", USES)
def test_the_example_works(name: str, tmp_path: Path) -> None:
    """In a process of its own: a part registers itself for good."""
    lines = USES[name].strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    code = "\n".join([f"from {name}_example import *", *(line[indent:] for line in lines)])
    (tmp_path / f"{name}_example.py").write_text(examples()[name], encoding="utf-8")
    path = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "tests" / "cache")))
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert run.returncode == 0, run.stderr
