"""Evaluation: against plain transformers, nothing lost where nothing is, and what the command prints."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny_chat import save_checkpoint
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from cache.errors import BudgetError, DiskSpaceError, ModelError, OffloadError, PolicyError
from offload import evaluate
from offload.model import OffloadedModel
from offload.options import LoadOptions, PlanOptions
from offload.plan.budgets import Plan
from offload.quality import evaluate as evaluation
from offload.quality import logits
from offload.system import quiet
from offload.terminal import main as cli

TEXT = "The experts of a layer are many, and a token goes to few of them. " * 3
OPTIONS: dict[str, Any] = {"cpu_mem": "8G", "device": "cpu", "threads": 1}
pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    yield from tiny.one_thread()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, threads: None) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def rounded(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint with coarse experts, which is loaded in its place wherever experts="rounded" is asked for."""
    folder = tmp_path / "rounded"
    shutil.copytree(checkpoint, folder)

    def coarse(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if ".experts." in name:
                tensor.copy_((tensor * 16).round() / 16)

    tiny.edit_tensors(folder, coarse)
    load, plan = OffloadedModel.open, evaluation.make_plan

    def opened(model: Path, options: LoadOptions, **more: Any) -> OffloadedModel:
        if options.experts != "rounded":
            return load(model, options, **more)
        return load(folder, replace(options, experts="auto"), **more)

    def planned(model: Path, options: PlanOptions) -> Plan:
        return plan(model, replace(options, experts="auto") if options.experts == "rounded" else options)

    monkeypatch.setattr(OffloadedModel, "open", opened)
    monkeypatch.setattr(evaluation, "make_plan", planned)
    return folder


def log_probabilities(folder: Path, windows: list[torch.Tensor], passes: int) -> torch.Tensor:
    """What transformers says of all tokens but each window's first, read in so many tokens a pass."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = []
    with torch.no_grad():
        for window in windows:
            cache = None
            for ids in window[None, :-1].split(passes, 1):
                output = model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                found.append(functional.log_softmax(output.logits[0].double(), -1))
    return torch.cat(found)


@pytest.mark.parametrize("decode", [False, True])
def test_figures_are_those_of_plain_transformers(checkpoint: Path, rounded: Path, decode: bool) -> None:
    ids = AutoTokenizer.from_pretrained(checkpoint)(TEXT, return_tensors="pt")["input_ids"][0]
    windows = list(ids[:150].split(64))
    target = torch.cat([window[1:] for window in windows])[:, None]
    reference, other = (log_probabilities(folder, windows, 1 if decode else 64) for folder in (checkpoint, rounded))
    (row,) = evaluate(
        checkpoint, {"text": TEXT}, [{"experts": "rounded"}], tokens=150, decode=decode, context=64, **OPTIONS
    )
    assert (row.tokens, row.window, row.mode) == (147, 64, "decode" if decode else "passes")
    assert row.reference_perplexity == pytest.approx(math.exp(-reference.gather(-1, target).mean()), rel=1e-5)
    assert row.perplexity == pytest.approx(math.exp(-other.gather(-1, target).mean()), rel=1e-5)
    assert row.kl == pytest.approx(float((reference.exp() * (reference - other)).sum(-1).mean()), rel=1e-3)
    assert row.kl > 1e-6
    assert row.top1_agreement == (reference.argmax(-1) == other.argmax(-1)).double().mean()
    assert row.configuration == {"experts": "rounded"}


def test_nothing_is_lost_where_nothing_is_degraded(checkpoint: Path, rounded: Path) -> None:
    configurations = [
        {"expert_cache": "25%"},
        {"expert_cache": "50%", "policy": "lru"},
        {"expert_cache": "75%", "fallback": "none"},
        {},
    ]
    texts = {"plain": TEXT, "prompts": ["Hi", "Who are you?"]}
    rows = list(evaluate(checkpoint, texts, configurations, tokens=40, **OPTIONS))
    assert [(row.text, row.configuration) for row in rows] == [
        (text, configuration) for configuration in configurations for text in texts
    ]
    assert all((row.kl, row.top1_agreement) == (0, 1) for row in rows)
    assert all(row.perplexity == row.reference_perplexity for row in rows)
    assert [row.mode for row in rows] == ["passes"] * 8
    expert = rows[-1].expert_cache_bytes // 8  # all of two layers of four
    assert [row.expert_cache_bytes for row in rows[::2]] == [2 * expert, 4 * expert, 6 * expert, 8 * expert]
    assert rows[-1].hit_rate > rows[0].hit_rate and rows[-1].bytes_from_disk < rows[0].bytes_from_disk
    assert all(set(row.precision_shares.values()) == {1} and row.tokens_per_s > 0 for row in rows)


def test_long_passes_give_their_logits_in_blocks(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tiny.ids(1, 50)
    with tiny.open_model(checkpoint) as model:
        whole = model.forward(input_ids=ids).logits[0]
        monkeypatch.setattr(logits, "BLOCK", 258 * 7)
        blocks, cache = logits.pass_logits(model, ids[:, :30], None)
        first = [block[0] for block in blocks]
        blocks, cache = logits.pass_logits(model, ids[:, 30:], cache)
        assert [len(block) for block in first] == [7, 7, 7, 7, 2]
        assert torch.allclose(torch.cat([*first, *(block[0] for block in blocks)]), whole, atol=1e-5)
        assert cache.get_seq_length() == 50


def kept(folder: Path) -> list[Path]:
    """All but how often experts were used."""
    return [each for each in folder.iterdir() if each.name != "calibrations"]


def test_the_logits_on_disk_vanish_and_need_room(
    checkpoint: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = evaluate(checkpoint, {"text": TEXT}, [{}, {}], tokens=20, **OPTIONS)
    next(rows)
    assert kept(cache_folder) == []
    rows.close()  # type: ignore[attr-defined]
    free = shutil.disk_usage(cache_folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    with pytest.raises(DiskSpaceError, match=r"19 tokens take 19.1 KiB .* 1000 B are free: lower --tokens"):
        next(evaluate(checkpoint, {"text": TEXT}, tokens=20, **OPTIONS))


def test_what_cannot_be_judged_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OffloadError, match="no text"):
        next(evaluate(checkpoint, {}))
    with pytest.raises(BudgetError, match="101%: a share of all experts is above 0% and at most 100%"):
        next(evaluate(checkpoint, {"text": TEXT}, [{"expert_cache": "101%"}]))
    with pytest.raises(OffloadError, match="short has less than two tokens"):
        next(evaluate(checkpoint, {"short": "a"}, **OPTIONS))
    with pytest.raises(PolicyError, match="preset fiddler learns from a recorded trace"):
        next(evaluate(checkpoint, {"short": "a"}, **OPTIONS, preset="fiddler"))  # before the reference, which has none
    with pytest.raises(ModelError, match="has no tokenizer"):
        next(evaluate(tiny.save(tmp_path / "mute", "qwen2_moe"), {"text": TEXT}, **OPTIONS))


def test_the_command(
    checkpoint: Path, rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quiet, "prepare", lambda: None)  # it sets up the whole process
    text, prompts = tmp_path / "a.txt", tmp_path / "p.jsonl"
    text.write_text(TEXT)
    prompts.write_text(json.dumps({"prompt": "Who are you?"}) + "\n")
    flags = ["--tokens", "30", "--cpu-mem", "8G", "--device", "cpu", "--threads", "1"]

    def run(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            cli.main(["eval", str(checkpoint), *flags, *args])
        return int(leaving.value.code or 0), *capsys.readouterr()

    every = ["--experts", "auto", "--experts", "rounded", "--expert-cache", "25%", "--expert-cache", "1M"]
    code, out, err = run("--text", str(text), "--prompts", str(prompts), *every, "--json")
    assert code == 0, err
    rows = json.loads(out)
    assert [row["configuration"] for row in rows[::2]] == [
        {"experts": experts, "expert_cache": size} for experts in ("auto", "rounded") for size in ("25%", "1M")
    ]
    assert [row["text"] for row in rows[:2]] == ["a.txt", "p.jsonl"]
    assert [row["kl"] > 0 for row in rows] == [False] * 4 + [True] * 4
    both = ["--experts", "auto", "--experts", "auto,nf4", "--fallback", "hobbit"]
    code, out, err = run("--text", str(text), *both, "--expert-cache", "50%", "--json")
    assert code == 0, err
    alone, mixed = json.loads(out)
    assert "fallback" not in alone["configuration"] and (alone["mode"], alone["kl"]) == ("passes", 0)
    assert mixed["mode"] == "decode" and len(mixed["precision_shares"]) == 2
    assert mixed["configuration"] == {"experts": "auto,nf4", "fallback": "hobbit", "expert_cache": "50%"}
    code, out, err = run("--text", str(text), "--expert-cache", "50%")
    assert code == 0 and "50%" in out and "100.00%" in out, err
    code, out, err = run("--text", str(text), "--experts", "auto", "--fallback", "hobbit")
    assert code == 2 and "needs a lower precision" in err and err.count("\n") == 1
    code, out, err = run()
    assert code == 2 and "--text FILE or --prompts FILE" in err and err.count("\n") == 1


def test_ctrl_c_keeps_the_rows_that_are_done(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quiet, "prepare", lambda: None)
    text = tmp_path / "a.txt"
    text.write_text(TEXT)
    add, calls = evaluation._Comparison.add, list[int]()

    def interrupted(self: Any, *args: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        add(self, *args)

    monkeypatch.setattr(evaluation._Comparison, "add", interrupted)
    with pytest.raises(SystemExit) as leaving:
        cli.main(["eval", str(checkpoint), "--text", str(text), "--tokens", "9", "--cpu-mem", "8G", "--device", "cpu",
                  "--expert-cache", "50%", "--expert-cache", "75%", "--json"])  # fmt: skip
    out, err = capsys.readouterr()
    assert leaving.value.code == 130 and "stopped: 1 of 2 rows were measured" in err
    assert [row["configuration"] for row in json.loads(out)] == [{"expert_cache": "50%"}]
