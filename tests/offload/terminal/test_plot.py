"""Figures of replays: lines that can be told apart without colour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import command_line
import pytest
from own_cache import own_cache

from offload.simulation.rows import BRACKETS
from offload.terminal import plot
from tests.cache.machines import machine
from tests.offload.simulation.made_trace import make_trace

pytest.importorskip("matplotlib")
_cache_folder = pytest.fixture(scope="module", autouse=True)(own_cache)


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    seen: list[Any] = []
    real = plot.save_figure
    monkeypatch.setattr(plot, "save_figure", lambda figure, path: (seen.append(figure), real(figure, path)))
    return seen


def test_marks_and_dashes_tell_lines_apart() -> None:
    labels = [*BRACKETS, *(f"p{n}" for n in range(75))]
    styles = plot.line_styles(labels)
    assert len({(style["marker"], style["linestyle"]) for style in styles.values()}) == len(labels)
    assert {styles[name]["color"] for name in BRACKETS} == {"black"}
    assert len(plot.line_styles([f"p{n}" for n in range(200)])) == 200


@pytest.mark.parametrize(
    ("flags", "labels"),
    [
        (["--preset", "fate,freetoken,default"], {"fate", "freetoken", "default"}),
        (
            ["--policy", "lfu(reset=True),lfu,mrs", "--predictor", "none,frequency"],
            {
                *("lru", "belady", "belady-bypass", "lfu(reset=True)", "lfu(reset=False)"),
                *("lfu(reset=True) with frequency", "lfu(reset=False) with frequency", "mrs", "mrs with frequency"),
            },
        ),
    ],
)
def test_every_line_has_a_name_and_a_mark_of_its_own(
    tmp_path: Path, figure: list[Any], flags: list[str], labels: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    trace, measured, file = tmp_path / "t.safetensors", tmp_path / "m.json", tmp_path / "out.png"
    make_trace(tokens=10).write(trace)
    machine().write(measured)
    arguments = [trace, *flags, "--capacity", "25%,50%,75%", "--machine", measured, "--plot", file]
    command_line.run(capsys, "replay", *arguments)
    assert file.read_bytes()[:4] == b"\x89PNG"
    (drawn,) = figure
    hits, speeds = drawn.axes
    assert {text.get_text() for text in drawn.legends[0].get_texts()} == labels
    for axis in (hits, speeds):
        lines = axis.get_lines()
        assert {line.get_label() for line in lines} == labels
        assert len({(line.get_marker(), line.get_linestyle(), line._dash_pattern) for line in lines}) == len(lines)
        assert all(list(line.get_xdata()) == [0.25, 0.5, 0.75] for line in lines)
