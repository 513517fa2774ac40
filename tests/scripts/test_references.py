"""The documentation's references."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.docs import check as check_docs


def test_dead_references_in_the_documentation_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "there.md").write_text("[up](../README.md) [web](https://example.org) [own](#part)\n")
    (tmp_path / "README.md").write_text("[docs](docs/there.md) `docs/there.md`\n```\n[not](a/link)\n```\n")
    assert check_docs.main(tmp_path) == 0
    (tmp_path / "README.md").write_text("[docs](docs/gone.md) and `scripts/gone.py`\n")
    assert check_docs.main(tmp_path) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "README.md: no such file: docs/gone.md",
        "README.md: no such file: scripts/gone.py",
    ]


def test_the_project_s_own_documentation_has_no_dead_reference() -> None:
    assert check_docs.main() == 0
