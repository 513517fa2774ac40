"""The package, imported where something of the same name is in the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
sys.path[:0] = sys.argv[2:]
spec = spec_from_file_location("offload", sys.argv[1])
spec.loader.exec_module(module_from_spec(spec))
"""


@pytest.mark.parametrize("other", ["cache", "cache/__init__.py", "cache.py"])
def test_what_is_in_the_way_is_named(tmp_path: Path, other: str) -> None:
    (tmp_path / "predictors").mkdir()
    there = tmp_path / other
    there.parent.mkdir(exist_ok=True)
    there.write_text("") if there.suffix else there.mkdir()
    found = subprocess.run(
        [sys.executable, "-I", "-S", "-c", PROGRAM, str(ROOT / "offload" / "__init__.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 1
    assert f'needs its own package "cache", but Python found {there} first' in found.stderr
    assert "rename or move that file or folder" in found.stderr


@pytest.mark.parametrize("other", ["cache", "cache/__init__.py", "cache.py", "predictors.py"])
def test_the_program_runs_where_something_is_in_the_way(tmp_path: Path, other: str) -> None:
    there = tmp_path / other
    there.parent.mkdir(exist_ok=True)
    there.write_text("raise SystemExit('not ours')") if there.suffix else there.mkdir()
    command = [sys.executable, "-m", "offload", "--version"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "") and run.stdout.startswith("offload ")


def test_an_editable_installation_is_found_before_folders_of_the_same_name() -> None:
    """By a path: pip's other way to link to a checkout comes after any folder of that name."""
    told = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '[tool.setuptools]\npackage-dir = { "" = "." }\n' in told
