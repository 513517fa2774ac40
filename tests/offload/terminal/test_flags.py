"""Help, and flags that mean what they say."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from tiny_chat import REPOSITORY, Resident, environment

import offload
from offload.options import Keywords, LoadOptions, ModelOptions, PlanOptions, SamplingOptions
from offload.terminal import loading
from offload.terminal.app import COMMANDS, TRACE_COMMANDS
from offload.terminal.commands.model import chat, generate
from offload.terminal.flags import FLAGS
from offload.terminal.flat import flat
from scripts.fuzz.tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plan", "--help"], ["chat", "--help"], []])
def test_help_and_version_do_not_load_torch(arguments: list[str]) -> None:
    program = (
        "import sys; from offload.terminal.main import main\ntry: main(sys.argv[1:])\n"
        "finally: assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert ("offload " + offload.__version__ if arguments == ["--version"] else "Usage: offload") in result.stdout


def test_module_runs_as_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "offload", "--version"],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    assert result.stdout == f"offload {offload.__version__}\n"


def test_documentation_is_what_the_help_says() -> None:
    subprocess.run(
        [sys.executable, REPOSITORY / "scripts" / "docs" / "cli.py", "--check"], env=environment(), check=True
    )


def test_documentation_has_every_spelling_of_a_flag() -> None:
    from typer.main import get_command

    from offload.terminal.app import app

    text = (REPOSITORY / "docs" / "cli.md").read_text(encoding="utf-8")
    commands: list[Any] = list(getattr(get_command(app), "commands", {}).values())
    commands += [inner for command in commands for inner in getattr(command, "commands", {}).values()]
    shown = [p for command in commands for p in command.params if p.help and p.param_type_name == "option"]
    names = {name for parameter in shown for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {"-o", "-n", "--warm", "--cold"} <= names
    assert [name for name in sorted(names) if f"`{name}`" not in text and f"`{name} " not in text] == []


@pytest.mark.parametrize("command", ["calibrate", "trace record"])
def test_a_limit_has_a_short_flag(run: Any, tmp_path: Path, command: str) -> None:
    (tmp_path / "p.jsonl").write_text("no prompt")
    given = ("tiny", "--prompts", str(tmp_path / "p.jsonl"), "-o", "out", "-n", "2")
    assert "p.jsonl, line 1: not a JSON object" in run(*command.split(), *given).err


def keywords(function: Callable[..., object]) -> dict[str, object]:
    return {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("command", [chat, generate])
def test_every_option_is_a_flag_and_a_keyword_with_one_default(command: Callable[..., None]) -> None:
    from offload.model import OffloadedModel

    options = {field.name: field.default for field in fields(LoadOptions)}
    assert keywords(OffloadedModel.from_pretrained) == {**options, "progress": False}
    flags = keywords(flat(command))
    assert {name: flags[name] for name in options} == options
    assert {field.name for kind in (LoadOptions, SamplingOptions) for field in fields(kind)} == set(FLAGS)


@pytest.mark.parametrize("kind", [ModelOptions, PlanOptions, LoadOptions, Keywords])
def test_every_option_is_explained_to_who_asks_python_for_help(kind: type[Any]) -> None:
    from offload.model import OffloadedModel

    for name in kind.__annotations__:
        assert f"\n{name}: " in (OffloadedModel.from_pretrained.__doc__ or "")


def shown(run: Any, *arguments: str) -> list[str]:
    """The flags that a help has, in order."""
    return re.findall(r"^│ (?:[* ]  {1,3})?(--[a-z-]+)", run(*arguments).out, re.MULTILINE)


@pytest.mark.parametrize("command", [*COMMANDS, *(f"trace {name}" for name in TRACE_COMMANDS)])
def test_help_is_short_and_help_all_has_everything(run: Any, command: str) -> None:
    short = shown(run, *command.split(), "--help")
    assert 0 < len(short) <= 15
    if "--help-all" not in short:
        return
    every = shown(run, *command.split(), "--help-all")
    assert set(short) < set(every)
    assert {"--trust-remote-code", "--policy"} & set(every)
    assert not {"--debug", "--policy-profile"} & set(every)


def test_old_names_of_flags_are_taken_and_said(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[LoadOptions] = []

    def load(name: str, options: LoadOptions) -> Resident:
        seen.append(options)
        return Resident(tokenizer=TOKENIZER)

    monkeypatch.setattr(loading, "load_model", load)
    command = ("generate", "tiny", "--prompt", "x", "--max-new-tokens", "1")
    result = run(*command, "--policy-profile", "T", "--predictor-profile", "T")
    assert result.code == 0 and seen[0].profile == "T"
    assert result.err.startswith("offload: --policy-profile is --profile now\noffload: --predictor-profile is")
    assert "there is one: give P or T" in run(*command, "--policy-profile", "T", "--profile", "P").err


def test_every_flag_reaches_the_model(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def load(name: str, options: LoadOptions) -> Resident:
        seen.update(asdict(options), model=name)
        return Resident(options.context, TOKENIZER)

    monkeypatch.setattr(loading, "load_model", load)
    given = {
        "gpu_mem": "8G",
        "cpu_mem": "16GB",
        "expert_cache": "900M",
        "context": 2048,
        "device": "emulated",
        "dtype": "float32",
        "preset": "fate",
        "policy": "lru",
        "profile": "T.safetensors",
        "pool": "layer",
        "quota": "dp",
        "predictor": "oracle",
        "prefetcher": "fate",
        "prefetch_depth": 3,
        "scheduler": "dali",
        "placement": "random",
        "prefill": "kept",
        "link": "3GB/s",
        "experts": "auto,nf4",
        "fallback": "hobbit",
        "expert_store": "records",
        "dense": "int8",
        "activations": "int8",
        "threads": 2,
        "revision": "main",
    }
    flags = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    flags += ["--exact", "--trust-remote-code", "--local-files-only"]
    assert run("generate", "some/model", "--prompt", "x", "--max-new-tokens", "1", *flags).code == 0
    assert seen == given | {"model": "some/model", "exact": True, "trust_remote_code": True, "local_files_only": True}
