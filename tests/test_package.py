"""The package, imported where something of the same name is in the way."""

from __future__ import annotations

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


def test_an_installation_by_make_is_found_before_folders_of_the_same_name() -> None:
    """By a path: pip's other way to link to a checkout comes after any folder of that name."""
    installs = [line for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines() if "pip install" in line]
    linked = [line for line in installs if " -e " in line]
    assert len(linked) == 2 and all("editable_mode=compat" in line for line in linked)
