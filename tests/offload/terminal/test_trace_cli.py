"""`offload trace`: prompts in, a trace out; Ctrl-C and what is in the way; figures as text, JSON and a plot."""

from __future__ import annotations

import builtins
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from families import families
from tiny_chat import save_checkpoint
from traces import batched_trace, random_trace, writer_of

from cache.traces.trace import Trace
from cache.traces.writer import TraceWriter, partial_folder
from offload.system import quiet
from offload.terminal import main as cli
from scripts.fuzz.tokenizer import tiny_tokenizer

SMALL = ["--cpu-mem", "8G", "--context", "256", "--device", "cpu", "--threads", "1"]
SHORT = ["--max-new-tokens", "4", "--temperature", "0"]


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., Result]:
    """Runs `offload trace ...` in this process."""
    monkeypatch.setattr(quiet, "prepare", lambda: None)  # it sets up the whole process

    def run(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as exited:
            cli.main(["trace", *map(str, arguments)])
        shown = capsys.readouterr()
        return Result(exited.value.code, shown.out, shown.err)

    return run


def one_line(result: Result) -> str:
    """The error of a run that a user's mistake ended."""
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("offload: error: ") and result.err.count("\n") == 1
    return result.err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "three.jsonl"
    lines = [json.dumps({"prompt": text, "domain": "x"}, ensure_ascii=False) for text in ("Hi", "a\u2028b", "Ü")]
    path.write_text("\n".join([lines[0], "", *lines[1:]]) + "\n", encoding="utf-8")
    return path


def test_records_every_prompt(run: Any, checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "t.safetensors"
    extras = ("--scores", "--predicted", "1", "--seed", "3")
    result = run("record", checkpoint, "--prompts", prompts, "-o", output, *extras, *SHORT, *SMALL)
    assert (result.code, result.out) == (0, "") and "3 sequences" in result.err
    trace = Trace.open(output)
    tokenizer = tiny_tokenizer()
    expected = [
        len(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        )
        for text in ("Hi", "a\u2028b", "Ü")
    ]
    assert np.diff(trace.sequence_offsets).tolist() == [length + 3 for length in expected]
    assert trace.workload == "three.jsonl" and trace.metadata["seed"] == "3" and trace.model == str(checkpoint)
    assert trace.metadata["score_function"] == "softmax" and trace.forward is None
    width = min(2 * trace.top_k, trace.num_experts)
    assert trace.predicted is not None and trace.predicted.shape[2:] == (1, width)
    assert f"{width} experts, 1 layer ahead" in run("info", output).out

    assert "exists: choose another name" in one_line(run("record", checkpoint, "--prompts", prompts, "-o", output))
    again = ["record", checkpoint, "--prompts", prompts, "-o", output, "--force", "--limit", 1, *SHORT, *SMALL]
    assert run(*again).code == 0
    trace = Trace.open(output)
    assert trace.num_sequences == 1 and trace.scores is None and trace.predicted is None


def test_a_model_without_a_chat_template_continues_the_prompt(run: Any, prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_checkpoint(folder)
    tokenizer = tiny_tokenizer(chat_template=None)
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    output = tmp_path / "t"
    assert run("record", folder, "--prompts", prompts, "-o", output, "--limit", 1, *SHORT, *SMALL).code == 0
    assert Trace.open(output).num_tokens == len("Hi") + 3


def test_ctrl_c_keeps_what_is_finished(
    run: Any, checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pressed in the second reply."""
    from offload.traces.recorder import TraceRecorder

    end_pass = TraceRecorder.end_pass

    def press(self: TraceRecorder, complete: bool) -> None:
        end_pass(self, complete)
        if self.num_sequences == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TraceRecorder, "end_pass", press)
    output = tmp_path / "t"
    result = run("record", checkpoint, "--prompts", prompts, "-o", output, *SHORT, *SMALL)
    assert result.code == 130 and f"stopped: {output} has the 1 finished of 3 sequences" in result.err
    assert Trace.open(output).num_sequences == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no prompts"),
        ('{"prompt": "x"}\n{"text": "y"}\n', 'line 2: not a JSON object with a text as its "prompt"'),
        ('{"prompt": 5}\n', "line 1"),
        ("just text\n", "line 1"),
        ("[1]\n", "line 1"),
    ],
)
def test_prompts_that_are_none_are_refused(run: Any, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p").write_text(text)
    assert message in one_line(run("record", "some/model", "--prompts", tmp_path / "p", "-o", tmp_path / "t"))


def test_mistakes_are_said(run: Any, checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    assert "missing.jsonl" in one_line(
        run("record", "m", "--prompts", tmp_path / "missing.jsonl", "-o", tmp_path / "t")
    )
    assert "t.safetensors" in one_line(run("info", tmp_path / "t.safetensors"))
    assert "no recording of" in one_line(run("recover", tmp_path / "t"))
    no_tokenizer = tmp_path / "model"
    families()["qwen3_moe"].save(no_tokenizer, tiny.torch.float32)
    asked = ["record", no_tokenizer, "--prompts", prompts, "-o", tmp_path / "t", *SMALL]
    assert "has no tokenizer" in run(*asked).err.splitlines()[-1]
    assert not (tmp_path / "t").exists() and not partial_folder(tmp_path / "t").exists()


def test_recover(run: Any, tmp_path: Path) -> None:
    trace = random_trace()
    writer, rows = writer_of(trace.select([0]), tmp_path / "t")
    for row in rows:
        writer.append(row)
    writer.keep()
    writer._open_files.close()
    with pytest.raises(Exception, match="interrupted recording"):
        TraceWriter(tmp_path / "t", trace.metadata, scores=False)
    result = run("recover", tmp_path / "t")
    assert result.code == 0 and "1 sequences" in result.err
    assert Trace.open(tmp_path / "t").fingerprint == trace.select([0]).fingerprint


# What a trace is like.


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    batched_trace().write(tmp_path / "t.safetensors")
    return tmp_path / "t.safetensors"


def test_info_as_json(run: Any, trace: Path) -> None:
    result = run("info", trace, "--json")
    assert result.code == 0 and result.out.count("\n") == 1
    info = json.loads(result.out)
    assert (info["tokens"], info["sequences"], info["layers"], info["experts"], info["top_k"]) == (29, 4, 2, 6, 2)
    assert (info["prefill_tokens"], info["decode_tokens"], info["padding_tokens"]) == (12, 9, 8)
    assert info["batched"] and not info["scores"] and info["predicted"] is info["expert_bytes"] is None
    assert [row["length"] for row in info["segments"]] == [4, 16, 64, 256]
    assert info["segments"][0]["srp"] > 0 and info["segments"][1]["srp"] is None
    assert len(info["lru"]["hit_rate_cold"]) == len(info["lru"]["slots"]) == 7
    assert info["union"]["prefill"]["events"] == 6 and info["union"]["decode"]["events"] == 10
    assert [row["slots"] for row in info["union"]["larger_than_cache"]] == [1, 2, 3, 4]


def test_info_as_text(run: Any, trace: Path) -> None:
    result = run("info", trace)
    assert result.code == 0
    info = json.loads(run("info", trace, "--json").out)
    for shown in ("29 in 4 sequences", "2 layers, top-2 of 6 experts", f"{info['overlap']:.1%}", "SRP", "SCH pool 3K"):
        assert shown in result.out
    assert f"{info['lru']['hit_rate_warm'][3]:.1%}" in result.out


def test_patterns_as_json_and_as_text(run: Any, trace: Path) -> None:
    result = run("info", trace, "--patterns", "--json")
    assert result.code == 0 and result.out.count("\n") == 1
    info = json.loads(result.out)
    assert info["next_layer"]["candidates"] == 1 and len(info["next_layer"]["held_out_per_layer"]) == 1
    assert len(info["next_token"]["together_per_layer"]) == 2 and info["together"]["pairs"] == 2
    assert info["popularity"]["overlap"].keys() == {"5"}
    text = run("info", trace, "--patterns").out
    for share in (info["next_layer"]["held_out"], info["next_token"]["together"], info["together"]["held_out"]):
        assert f"{share:.1%}" in text
    assert f"{info['skew']['largest']:.2f}" in text and f"{info['popularity']['spearman']:.2f}" in text


def test_patterns_of_a_trace_that_has_few(run: Any, tmp_path: Path) -> None:
    random_trace(lengths=(5,), layers=1, top_k=1).write(tmp_path / "t")
    info = json.loads(run("info", tmp_path / "t", "--patterns", "--json").out)
    assert (
        info["popularity"] is info["together"] is info["next_layer"]["seen"] is info["next_token"]["held_out"] is None
    )
    text = run("info", tmp_path / "t", "--patterns").out
    assert "the trace has only one of them" in text and "pairs" not in text


def test_patterns_have_no_plot(run: Any, trace: Path, tmp_path: Path) -> None:
    assert "--plot does nothing" in one_line(run("info", trace, "--patterns", "--plot", tmp_path / "p.png"))


def test_info_refuses_damage(run: Any, trace: Path) -> None:
    data = trace.read_bytes()
    trace.write_bytes(data[:-1])
    assert "cut short" in one_line(run("info", trace))


def test_plot_is_an_image(run: Any, trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run("info", trace, "--plot", tmp_path / "plot.png").code == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "--plot" in one_line(run("info", trace, "--plot", tmp_path / "plot.nonsense"))


def test_plot_without_matplotlib_says_how_to_get_it(run: Any, trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importing = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return importing(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", missing)
    assert "pip install matplotlib" in one_line(run("info", trace, "--plot", trace.with_suffix(".png")))
