"""The documentation's references, and the parts that it names."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cache.policy import names as policy_names
from offload.decide.fallbacks.base import _registry as fallbacks
from offload.decide.schedulers.base import scheduler_names
from predictors.base import names as predictor_names
from scripts.docs import check as check_docs

NAME = re.compile(r"`([\w-]+)")


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


@pytest.mark.parametrize(
    ("document", "names"),
    [
        ("policies.md", policy_names),
        ("scheduling.md", scheduler_names),
        ("precision.md", fallbacks.names),
        ("predictors.md", predictor_names),
    ],
)
def test_every_part_that_the_project_brings_has_a_row_in_its_document(
    document: str, names: Callable[[], tuple[str, ...]]
) -> None:
    text = (check_docs.ROOT / "docs" / document).read_text(encoding="utf-8")
    named = {
        name for line in text.splitlines() if line.startswith("| `") for name in NAME.findall(line.split(" | ")[0])
    }
    assert names() and set(names()) <= named
