"""The command line: what goes to which stream, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_chat import RESIDENT, STATS, Resident, environment, run_program

from cache.errors import BudgetError
from offload.decide.preset import DEFAULT
from offload.options import LoadOptions, PlanOptions
from offload.system.instructions import LEVELS
from offload.terminal import exits, loading
from offload.terminal import main as cli
from offload.terminal.tables import status_line
from scripts.fuzz.tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
LONG = ["--max-new-tokens", "12", "--temperature", "0"]


def one_line(result: Any) -> str:
    """The error of a run that a user's mistake ended."""
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("offload: error: ")
    assert result.err.count("\n") == 1
    return result.err


def test_reply_goes_to_stdout_and_statistics_to_stderr(run: Any) -> None:
    result = run("chat", "tiny", "--prompt", "Hello", *LONG)
    assert result.code == 0
    assert result.out.endswith("\n")
    expected = json.loads(run("chat", "tiny", "--prompt", "Hello", "--json", *LONG).out)["text"]
    assert result.out == expected + "\n"
    assert result.err == ("12 tokens (cut at the limit) · 12.5 tok/s · hit rate 75% · RAM 512.0 MiB of 1.00 GiB\n")


def test_stats_shows_every_counter(run: Any) -> None:
    result = run("chat", "tiny", "--prompt", "Hello", "--stats", *LONG)
    rows = {line.split()[0]: line.split(maxsplit=1)[1].strip() for line in result.err.splitlines()}
    assert rows["hit_rate"] == "0.750"
    assert rows["peak_gpu_bytes"] == "-"
    assert rows["cpu.bytes_in"] == "4.0 KiB"


@pytest.mark.parametrize("command", [["chat", "tiny"], ["generate", "tiny"]])
def test_json_is_exactly_one_object(run: Any, command: list[str]) -> None:
    result = run(*command, "--prompt", "Hello", "--json", *LONG)
    reply = json.loads(result.out)
    assert result.out.count("\n") == 1
    assert result.err == ""
    assert {name: reply[name] for name in STATS} == STATS
    assert reply["text"] == TOKENIZER.decode(reply["token_ids"])
    assert len(reply["token_ids"]) == 12
    assert reply["finish"] == "length"


def prompts_of(run: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str, stdin: str) -> list[str]:
    model = Resident(tokenizer=TOKENIZER)
    monkeypatch.setattr(loading, "load_model", lambda name, options: model)
    assert run(*arguments, "--max-new-tokens", "1", stdin=stdin).code == 0
    return [TOKENIZER.decode(prompt) for prompt in model.prompts]


def test_all_of_a_pipe_is_one_prompt(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    [prompt] = prompts_of(run, monkeypatch, "chat", "tiny", stdin="first line\nsecond line\n")
    assert prompt == "<|im_start|>user\nfirst line\nsecond line<|im_end|>\n<|im_start|>assistant\n"
    [prompt] = prompts_of(run, monkeypatch, "generate", "tiny", stdin="def f():\n")
    assert prompt == "def f():\n"


def test_text_that_is_not_utf8_is_read_as_far_as_it_goes(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = os.fsdecode(b"a\xffb")
    [prompt] = prompts_of(run, monkeypatch, "chat", "tiny", "--prompt", text, "--system", text, stdin="")
    assert prompt.count("a\N{REPLACEMENT CHARACTER}b<|im_end|>") == 2
    [prompt] = prompts_of(run, monkeypatch, "generate", "tiny", "--prompt", text, stdin="")
    assert prompt == "a\N{REPLACEMENT CHARACTER}b"


def test_a_pipe_is_appended_to_the_prompt(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    [prompt] = prompts_of(run, monkeypatch, "chat", "tiny", "--prompt", "Sum this up:", stdin="a text\n")
    assert "user\nSum this up:\n\na text<|im_end|>" in prompt


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["chat", "tiny"], "the prompt is empty"),
        (["chat", "tiny", "--prompt", " "], "the prompt is empty"),
        (["generate", "tiny"], "the prompt is empty"),
        (["generate", "tiny", "--prompt", "x", "--prompt-ids", "1"], "give one prompt"),
        (["generate", "tiny", "--prompt-ids", "1,x"], '--prompt-ids: cannot read "1,x"'),
        (["generate", "tiny", "--prompt-ids", "1,258"], "token id 258 is not in the model's vocabulary"),
        (["generate", "tiny", "--prompt-ids=-1"], "token id -1"),
        (["generate"], "Missing argument 'MODEL'"),
        (["chat", "tiny", "--promt", "x"], "No such option: --promt"),
        (["chat", "tiny", "--seed", "x"], "--seed"),
        (["chat", "tiny", "--prompt", "x", "--temperature=-1"], "--temperature"),
        (["chat", "tiny", "--prompt", "x", "--top-p", "1.5"], "--top-p"),
        (["chat", "tiny", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["chat", "tiny", "--prompt", "x", "--temperature", "0", "--top-p", "0.5"], "--top-p does nothing"),
        (["chat", "tiny", "--prompt", "x" * 200, "--context", "100"], "do not fit a context of 100"),
        (["chat", "tiny", "--prompt", "x", "--context", "100", "--max-new-tokens", "100"], "raise --context"),
        (["talk"], "No such command 'talk'"),
    ],
    ids=" ".join,
)
def test_a_users_mistake_is_one_line_and_exit_code_2(run: Any, arguments: list[str], says: str) -> None:
    assert says in one_line(run(*arguments))


def test_an_error_of_the_model_is_one_line_and_debug_shows_where(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, options: LoadOptions) -> None:
        raise BudgetError("--cpu-mem 1M is too small:\nthe smallest that works is 3G")

    monkeypatch.setattr(loading, "load_model", refuse)
    message = one_line(run("generate", "tiny", "--prompt", "x"))
    assert message == "offload: error: --cpu-mem 1M is too small: the smallest that works is 3G\n"
    for arguments in (["--debug", "generate", "tiny"], ["generate", "tiny", "--debug"]):
        with pytest.raises(BudgetError):
            cli.main([*arguments, "--prompt", "x"])


def test_a_checkpoint_without_tokenizer_continues_ids_and_refuses_text(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_model", lambda name, options: Resident())
    result = run("generate", "tiny", "--prompt-ids", "1, 2,3", "--json", *LONG)
    reply = json.loads(result.out)
    assert reply["text"] is None
    assert len(reply["token_ids"]) == 12
    plain = run("generate", "tiny", "--prompt-ids", "1,2,3", *LONG)
    assert plain.out == ",".join(map(str, reply["token_ids"])) + "\n"
    assert "--prompt-ids 1,2,3" in one_line(run("generate", "tiny", "--prompt", "x"))
    assert "offload generate tiny --prompt-ids" in one_line(run("chat", "tiny", "--prompt", "x"))


def test_generate_stops_at_256_tokens_unless_told(run: Any) -> None:
    reply = json.loads(run("generate", "tiny", "--prompt", "x", "--temperature", "0", "--json").out)
    assert len(reply["token_ids"]) == 256


def test_without_a_model_it_chats_with_the_demo(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[object] = []

    def load(name: object, options: LoadOptions) -> Resident:
        loaded.append(name)
        return Resident(tokenizer=TOKENIZER)

    monkeypatch.setattr(loading, "load_model", load)
    monkeypatch.setitem(sys.modules, "offload.demo.build", SimpleNamespace(demo_path=lambda progress: Path("/demo")))
    assert run("chat", "--prompt", "x", "--max-new-tokens", "1").code == 0
    assert loaded == [Path("/demo")]
    assert run("demo").out == "/demo\n"


def test_plan_prints_its_rows_sums_and_budgets(run: Any, checkpoint: str) -> None:
    result = run("plan", checkpoint, "--cpu-mem", "3G", "--device", "emulated", "--gpu-mem", "1G", "--context", "512")
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert lines[0] == f"{checkpoint} on emulated in float32"
    assert any(line.startswith("KV cache gpu") and line.endswith("512 tokens") for line in lines)
    assert sum(line.startswith("expert cache") for line in lines) == 2
    assert [line.split(" of a ")[1] for line in lines if line.startswith("sum")] == [
        "budget of 1.00 GiB",
        "budget of 3.00 GiB",
    ]
    assert (result.code, result.err.count("\n")) == (0, 1)
    assert "no prediction of speeds: this machine has not been measured" in result.err
    assert any(line.startswith("peak RAM") for line in lines)


def test_plan_as_json_is_exactly_one_object(run: Any, checkpoint: str) -> None:
    result = run("plan", checkpoint, "--cpu-mem", "3G", "--json")
    assert result.out.count("\n") == 1
    plan = json.loads(result.out)
    assert plan["cpu_mem_bytes"] == 3 * 2**30
    assert plan["cpu"]["instructions"] in LEVELS
    assert plan["cpu"]["kernels"].keys() == {"plain", "int8", "nf4", "nested"}
    exact = json.loads(run("plan", checkpoint, "--cpu-mem", "3G", "--json", "--exact").out)
    assert exact["cpu"]["kernels"]["plain"] == "torch"


def test_plan_says_what_has_no_effect_and_what_must_be_downloaded(
    run: Any, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offload.plan import prepare as placement

    plan = placement.make_plan(checkpoint, PlanOptions(cpu_mem="3G"))
    remote = replace(plan, download_bytes=5 * 2**30, notes=("[--gpu-mem] has no effect",))
    monkeypatch.setattr(placement, "plan_and_parts", lambda model, options: (remote, DEFAULT))
    result = run("plan", checkpoint)
    assert ["to", "download", "disk", "5.00", "GiB"] in [line.split() for line in result.out.splitlines()]
    assert "offload: warning: [--gpu-mem] has no effect\n" in result.err


def test_ctrl_c_while_loading(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, options: LoadOptions) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loading, "load_model", load)
    result = run("chat", "tiny", "--prompt", "x")
    assert (result.code, result.out, result.err) == (130, "", "offload: interrupted\n")


def test_ctrl_c_during_a_single_answer_shows_what_there_is(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Resident):
        def generate(self, **arguments: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            return super().generate(**arguments)

    monkeypatch.setattr(loading, "load_model", lambda name, options: Interrupted(tokenizer=TOKENIZER))
    result = run("generate", "tiny", "--prompt", "x", "--json")
    reply = json.loads(result.out)
    assert (result.code, reply["finish"], len(reply["token_ids"])) == (130, "interrupted", 1)


def test_a_reader_that_leaves_ends_the_program_quietly(checkpoint: str) -> None:
    command = [sys.executable, "-m", "offload", "generate", checkpoint, "--prompt", "x"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=environment()
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == exits.BROKEN_PIPE


@pytest.mark.parametrize("arguments", [["plan"], ["plan", "--json"], ["--help"]], ids=" ".join)
def test_output_that_nobody_reads_ends_every_command_like_that(checkpoint: str, arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "offload", *arguments, *([checkpoint] if "plan" in arguments else [])]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment(), check=False)
    os.close(write)
    assert done.returncode == exits.BROKEN_PIPE
    assert "error" not in done.stderr


def test_libraries_are_quiet_and_our_own_warnings_are_one_line() -> None:
    noise = """
import logging, warnings
OURS = dict(category=UserWarning, filename="x.py", lineno=1, module="offload.model")
def load(name, options):
    from transformers.utils import logging as chatter
    warnings.warn_explicit("library", UserWarning, "x.py", 1, module="torch.nn")
    warnings.warn_explicit("--gpu-mem has no effect:\\nno GPU here", **OURS)
    chatter.get_logger("transformers.modeling_utils").warning("chatter")
    logging.getLogger("some.library").warning("chatter")
    logging.getLogger("offload.model").warning("logged")
    return load_model(name, options)
loading.load_model = load
"""
    result = run_program("chat", "tiny", "--prompt", "x", "--max-new-tokens", "1", program=RESIDENT + noise)
    *warned, status = result.stderr.splitlines()
    assert warned == [
        "offload: warning: --gpu-mem has no effect: no GPU here",
        "offload: warning: logged",
    ]
    assert status.startswith("1 tokens")


def test_status_line_counts_an_emulated_accelerators_memory_as_ram() -> None:
    reply = SimpleNamespace(
        token_ids=[1],
        finish="stop",
        device="cuda:0",
        stats=STATS | {"decode_tokens_per_s": 0.0, "gpu_mem_bytes": 2**31, "peak_gpu_bytes": 2**30},
    )
    assert status_line(reply) == ("1 tokens · hit rate 75% · RAM 512.0 MiB of 1.00 GiB · GPU 1.00 GiB of 2.00 GiB")
    reply.device = "emulated"
    assert "RAM 512.0 MiB of 3.00 GiB · GPU 1.00 GiB of 2.00 GiB" in status_line(reply)
