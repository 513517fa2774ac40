"""`offload replay --preset`: its table, its flags, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import command_line
import pytest
from made_trace import make_trace
from own_cache import own_cache

from offload.decide.presets import PRESETS
from offload.system.paths import machine_profile_path
from offload.terminal.main import main
from tests.cache.machines import machine

_cache_folder = pytest.fixture(scope="module", autouse=True)(own_cache)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("traces") / "made.safetensors"
    make_trace().write(file)
    return file


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    """(standard output, standard error) of `offload replay` with `arguments`."""
    return command_line.run(capsys, "replay", *arguments, code=code)


def test_all_presets_in_one_table(path: Path, profile_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [path, "--preset", "all", "--machine", profile_file, "--device", "gpu", "--host-capacity", "60%"]
    out, err = run(capsys, *flags, "--json")
    rows = json.loads(out)
    assert {row["preset"] for row in rows} == {"default", *PRESETS} - {"finemoe", "fiddler"}
    assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
    assert err.count("is left out: it learns from a recorded trace") == 2
    out, _ = run(capsys, *flags, "--profile", path)
    assert all(name in out for name in (*PRESETS, "disk/token", "lossless", "on the gpu", "60% in RAM"))


def test_a_table_of_presets_says_that_its_machine_was_estimated(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, path, "--preset", "fate,hobbit", "--machine", "a6000-workstation", "--device", "gpu")
    assert out.count("estimated: a6000-workstation: from specifications, not measured") == 1


def test_flags_win_over_every_preset(path: Path, profile_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--preset", "fate,hobbit", "--machine", profile_file, "--policy", "lfu", "--predictor", "none", "--json"]
    rows = json.loads(run(capsys, path, *flags)[0])
    assert [(row["policy"], row["predictor"], row["prefetch_depth"]) for row in rows] == [("lfu", "none", None)] * 2
    assert {row["fallback"] for row in rows} == {"none", "hobbit(skip=True)"}


def test_a_quota_brings_a_cache_for_each_layer(
    path: Path, profile_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--preset", "fate,hobbit", "--machine", profile_file, "--json"]
    rows = json.loads(run(capsys, path, *flags)[0])
    assert {row["preset"]: (row["pool"], row["quota"]) for row in rows} == {
        "fate": ("layer", "shallow"),
        "hobbit": ("global", None),
    }
    rows = json.loads(run(capsys, path, *flags, "--quota", "plec")[0])
    assert {(row["pool"], row["quota"]) for row in rows} == {("layer", "plec")}
    rows = json.loads(run(capsys, path, *flags, "--pool", "global")[0])
    assert {(row["pool"], row["quota"]) for row in rows} == {("global", None)}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--preset", "fat"], "no preset is called"),
        (["--preset", "fiddler"], "name one with --profile"),
        (["--preset", "fate", "--policy", "lru,lfu"], "takes one name"),
        (["--preset", "fate", "--quota", "dp", "--pool", "global"], "with --pool global all have one"),
        (["--preset", "fate", "--quota", "fair"], "no quota is called"),
        (["--preset", "fate", "--jobs", "2"], "--jobs does nothing without --sweep"),
    ],
)
def test_mistakes_end_in_one_line(
    path: Path, profile_file: Path, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = run(capsys, path, "--machine", profile_file, *arguments, code=2)
    assert complaint in err and err.count("\n") == 1


def test_a_depth_goes_to_those_that_have_a_predictor(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine().write(machine_profile_path())
    with pytest.raises(SystemExit):
        main(["replay", str(path), "--preset", "default,fate", "--prefetch-depth", "2", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert {row["preset"]: row["prefetch_depth"] for row in rows} == {"default": 2, "fate": 2}
    for names, words in (("freetoken", "none of these presets has one"), ("auto", "`offload tune` stored")):
        with pytest.raises(SystemExit):
            main(["replay", str(path), "--preset", names, "--prefetch-depth", "2"])
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["replay", str(path), "--preset", "fate", "--device", "gpu", "--host-capacity", "200%"])
    assert '--host-capacity "200%": a share' in capsys.readouterr().err


def test_a_machine_that_was_not_measured_is_said(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path))
    for flags in (["--timed"], ["--preset", "all"]):
        _, err = run(capsys, path, *flags, code=2)
        assert err.endswith(": this machine has not been measured: run `offload profile`, or give --machine\n")
