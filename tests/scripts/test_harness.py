"""What the benchmarks share."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from cache.errors import DiskSpaceError, OffloadError
from scripts.bench import common, serve, storage, workers
from scripts.bench.make_checkpoint import write_checkpoint
from tests.scripts.small import ROOT, linux, needs_cgroup, tiny


@pytest.fixture
def few_threads() -> Iterator[int]:
    """A thread count for engines, which set torch's; afterwards it is as before."""
    import torch

    before = torch.get_num_threads()
    yield 1
    torch.set_num_threads(before)


ECHO = """
import sys
sys.path[:0] = {path!r}
from scripts.bench.serve import serve

def load():
    print("noise")
    return lambda request: {{"double": 2 * request["value"], "grown": len(bytearray(request["grow"]))}}

sys.exit(serve(load))
"""


def echo_command() -> list[str]:
    return [sys.executable, "-c", ECHO.format(path=[str(ROOT), *sys.path])]


@linux
def test_a_worker_answers_in_turn_and_its_peak_is_measured() -> None:
    with workers.Worker("echo", echo_command()) as worker:
        assert worker.ask(value=4, grow=0)["double"] == 8
        assert worker.ask(value=5, grow=64 << 20)["grown"] == 64 << 20
    assert worker.peak_rss_bytes > 64 << 20


@linux
def test_a_worker_that_fails_is_an_error_not_a_hang(capfd: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(OffloadError, match="echo ended early: its own message is above"),
        workers.Worker("echo", echo_command()) as worker,
    ):
        worker.ask(value=None, grow=0)
    assert "TypeError" in capfd.readouterr().err


@needs_cgroup
def test_a_worker_killed_for_memory_is_named_so() -> None:
    with (
        pytest.raises(OffloadError, match="echo ended early: killed for memory"),
        workers.Worker("echo", echo_command(), memory_bytes=60 << 20) as worker,
    ):
        worker.ask(value=1, grow=200 << 20)


@linux
def test_disk_bandwidth_reads_whole_records(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(os.urandom(1 << 20))
    (tmp_path / "small.safetensors").write_bytes(b"x")
    speed = storage.disk_bandwidth(storage.shards(tmp_path), 100_000, seed=0, total_bytes=1 << 20)
    assert speed > 0
    with pytest.raises(OffloadError, match="no shard is larger than one record"):
        storage.disk_bandwidth([tmp_path / "small.safetensors"], 100_000, seed=0)
    with pytest.raises(OffloadError, match="holds no"):
        storage.shards(tmp_path / "nowhere")


def test_random_ids_are_fixed_by_their_seed() -> None:
    ids = common.random_ids(200, 100, seed=3)
    assert ids == common.random_ids(200, 100, seed=3)
    assert ids != common.random_ids(200, 100, seed=4)
    assert 50 < len(set(ids)) <= 100
    assert all(0 <= token < 100 for token in ids)


def arguments() -> common.Arguments:
    made = common.Arguments("What it measures.", "checkpoint", tokens=40, repetitions=5, threads=None)
    made.option("--memory", "4G", "a budget")
    return made


def test_the_result_is_the_last_line_and_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def measure(args: argparse.Namespace) -> dict[str, object]:
        common.note("measuring")
        common.show({"ours": {"s_per_token": 0.25, "read_bytes": 2**20}})
        return {"ratio": 2.0}

    def fail(args: argparse.Namespace) -> dict[str, object]:
        raise common.BenchmarkError("no disk")

    assert arguments().run(measure, ["/data/model", "--memory", "2G"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out.splitlines()[-1])
    assert (result["ratio"], result["checkpoint"], result["memory"], result["tokens"]) == (2.0, "model", "2G", 40)
    assert result["machine"]["instructions"] in said.err
    assert "s per token" in said.err and "1.0 MiB" in said.err
    assert arguments().run(fail, ["model"]) == 2
    assert capsys.readouterr().err == "error: no disk\n"
    assert arguments().run(measure, ["model", "--json"]) == 0
    assert capsys.readouterr().err == ""


def test_a_quick_run_repeats_less_than_it_would_and_no_more_than_told() -> None:
    args = arguments().parse(["model", "--quick"])
    assert (args.repetitions, args.tokens) == (2, 8)
    assert args.threads == common.default_threads()
    args = arguments().parse(["model", "--quick", "--tokens", "30"])
    assert (args.repetitions, args.tokens) == (2, 30)


def test_turns_go_there_and_back() -> None:
    assert list(common.turns("ab", 3)) == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]
    calls: list[str] = []
    measured = common.take_turns({name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}, 2)  # type: ignore[misc]
    assert "".join(calls) == "ab" + "ab" + "ba"
    assert measured == {"a": [3, 6], "b": [4, 5]}


def test_rows_come_in_turn_with_their_first_figures_told(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[str, int]] = []

    def window(name: str, repetition: int) -> common.Result:
        calls.append((name, repetition))
        return {"s_per_token": len(calls) / 8, "hits": 2 * len(calls)}

    rows = common.in_turn("ab", 2, window)
    assert calls == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert rows == {
        "a": [{"s_per_token": 0.125, "hits": 2}, {"s_per_token": 0.5, "hits": 8}],
        "b": [{"s_per_token": 0.25, "hits": 4}, {"s_per_token": 0.375, "hits": 6}],
    }
    assert "repetition 2, b: 0.375 s per token" in capsys.readouterr().err
    assert common.summary(rows) == {"a": {"s_per_token": 0.3125, "hits": 5}, "b": {"s_per_token": 0.3125, "hits": 5}}
    assert common.ratio_of("hits", rows["b"], rows["a"]) == (2 + 0.75) / 2


def test_sizes_are_bytes_and_others_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    made = common.Arguments("What it measures.")
    made.option("--memory", "4G", "a budget", type=common.size)
    assert [made.parse(given).memory for given in ([], ["--memory", "2KB"])] == [4 << 30, 2000]
    with pytest.raises(SystemExit):
        made.parse(["--memory", "plenty"])
    assert "plenty" in capsys.readouterr().err


def test_room_on_the_disk_is_asked_for_before_it_is_taken(tmp_path: Path) -> None:
    storage.need_space(tmp_path, 1, "for nothing")
    with pytest.raises(DiskSpaceError, match="are needed: for everything"):
        storage.need_space(tmp_path, 1 << 60, "for everything")


def test_who_chose_the_same() -> None:
    ours, theirs = ([{"chosen": each} for each in own] for own in ([[1, 2, 3], [4]], [[1, 5], [4, 6]]))
    assert serve.same_choices(ours, theirs) == [True, False, True]
    assert serve.same_choices(ours, []) == []


def test_medians_and_ratios() -> None:
    assert common.medians([{"a": 1, "b": 5}, {"a": 3, "b": 4}, {"a": 2, "b": 9}]) == {"a": 2, "b": 5}
    assert common.ratio([2, 9, 4], [1, 3, 4]) == 2
    assert common.markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


@pytest.mark.parametrize("folder", ["bench", "peers", "carve", "docs"])
def test_no_script_hides_a_module(folder: str) -> None:
    # A script's own folder is where Python looks first.
    names = {path.stem for path in (ROOT / "scripts" / folder).glob("*.py")} - {"__init__", "scripts"}
    assert not names & (sys.stdlib_module_names | packages_distributions().keys() | {"kernels", "airllm", "llama_cpp"})


def test_engines_choose_the_same_tokens(tmp_path: Path, few_threads: int) -> None:
    from scripts.bench.engines import handler, load

    model = tmp_path / "model"
    write_checkpoint(tiny("qwen3-30b-a3b", experts=16), model, shard_bytes=100_000)
    engines = {
        "offload": load("offload", model, threads=few_threads, context=64, device="cpu"),
        "transformers": load("transformers", model, threads=few_threads),
        "accelerate": load("accelerate", model, threads=few_threads, folder=tmp_path / "rewritten"),
        "half": load("accelerate", model, threads=few_threads, folder=tmp_path / "half", cpu_layers=1),
        "dense": load("dense", model, threads=few_threads),
    }
    ids = common.random_ids(24, 128, seed=0)
    ask = {name: handler(engine) for name, engine in engines.items()}
    answers = {name: one({"ids": ids}) for name, one in ask.items()}

    assert all(len(answer["seconds"]) == 24 for answer in answers.values())
    assert len(set(answers["transformers"]["chosen"])) > 5
    for name in ("offload", "accelerate", "half"):
        assert answers[name]["chosen"] == answers["transformers"]["chosen"], name
    stats = answers["offload"]["stats"]
    assert stats["hits"] + stats["misses"] + stats["late_hits"] == 24 * 2 * 2
    assert len(list((tmp_path / "rewritten").iterdir())) == 2 * len(list((tmp_path / "half").iterdir())) == 4
    assert ask["offload"]({"ids": ids, "prefill": True})["seconds"][0] > 0
    assert len(ask["transformers"]({"ids": ids, "at_most_s": 0})["chosen"]) == 1
    later = ask["offload"]({"ids": ids, "warm_up": 20})
    assert later["chosen"] == answers["offload"]["chosen"][20:]
    assert later["stats"]["hits"] + later["stats"]["misses"] + later["stats"]["late_hits"] == 4 * 2 * 2
    assert ask["offload"]({})["load_s"] > 0
    engines["offload"].close()


def test_an_engine_that_cannot_says_why_ever_after(capfd: pytest.CaptureFixture[str]) -> None:
    def load() -> serve.Handler:
        raise ImportError("no such engine\nas this one")

    def fail(request: serve.Request) -> serve.Answer:
        raise ValueError(request["value"])

    assert serve.explaining(load)({}) == {"unable": "ImportError: no such engine"}
    handle = serve.explaining(lambda: fail)
    assert [handle({"value": text}) for text in "ab"] == [{"unable": "ValueError: a"}] * 2
    assert serve.explaining(lambda: dict)({"value": 3}) == {"value": 3}
    assert "Traceback" in capfd.readouterr().err
