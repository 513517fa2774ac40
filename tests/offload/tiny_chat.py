"""A tiny Qwen2-MoE that chats (badly, for ever), and a real terminal to run the program at."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from scripts.fuzz.tokenizer import tiny_tokenizer

REPOSITORY = Path(__file__).parents[2]


def tiny_model() -> Any:
    """Random weights; never ends by itself."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        eos_token_id=257,
        pad_token_id=257,
        bos_token_id=None,
    )
    model = Qwen2MoeForCausalLM(config).eval()
    model.generation_config.suppress_tokens = [256, 257]
    return model


def save_checkpoint(folder: Path) -> Path:
    """Writes the tiny model and its tokenizer as a checkpoint folder."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


STATS = {
    "precision_uses": {"bf16": 4},
    "hit_rate": 0.75,
    "hits": 3,
    "decode_tokens_per_s": 12.5,
    "prefill_tokens_per_s": 99.0,
    "peak_rss_bytes": 512 * 2**20,
    "peak_gpu_bytes": None,
    "cpu_mem_bytes": 2**30,
    "gpu_mem_bytes": None,
    "tiers": {"cpu": {"hits": 3, "bytes_in": 4096}},
}


class Resident:
    """What the terminal uses of an OffloadedModel, all in memory; records each prompt it was given."""

    def __init__(self, context: int = 4096, tokenizer: Any | None = None) -> None:
        self._model = tiny_model()
        self.tokenizer = tokenizer
        self.context = context
        self.config = self._model.config
        self.generation_config = self._model.generation_config
        self.device = torch.device("cpu")
        self.plan = SimpleNamespace(device="cpu")
        self.stats = SimpleNamespace(as_dict=lambda: dict(STATS))
        self.prompts: list[list[int]] = []

    def __enter__(self) -> Resident:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def reset_stats(self) -> None:
        pass

    def generate(self, **arguments: Any) -> Any:
        self.prompts.append(arguments["input_ids"][0].tolist())
        return self._model.generate(**arguments)


class Scripted(Resident):
    """A model that says what it is told to."""

    def __init__(self, tokenizer: Any, *replies: str) -> None:
        super().__init__(tokenizer=tokenizer)
        self.config.vocab_size = len(tokenizer)
        self._replies = [tokenizer(reply, add_special_tokens=False)["input_ids"] for reply in replies]

    def generate(self, **arguments: Any) -> Any:
        self.prompts.append(arguments["input_ids"][0].tolist())
        streamer, reply = arguments["streamer"], self._replies.pop(0)
        streamer.put(arguments["input_ids"])
        for token in reply:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.cat([arguments["input_ids"], torch.tensor([reply], dtype=torch.long)], 1)


RESIDENT = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from offload.terminal import loading
def load_model(name, options):
    from scripts.fuzz.tokenizer import tiny_tokenizer
    from tiny_chat import Resident
    return Resident(options.context or 4096, tiny_tokenizer())
loading.load_model = load_model
"""  # what makes the program run the tiny model


class Terminal:
    """The program at a pseudo-terminal of its own, so that Ctrl-C and Ctrl-D are what a person presses."""

    _PROGRAM = (
        "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "from offload.terminal.main import main; main(sys.argv[1:])"
    )

    def __init__(self, *arguments: str) -> None:
        self._master, slave = os.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", self._PROGRAM, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=environment() | {"TERM": "dumb"},
        )
        os.close(slave)
        self.seen = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def enter(self, line: str) -> None:
        """Types a line at the next prompt."""
        self.wait_for("> ")
        self.type(line + "\n")

    def wait_for_prompt(self) -> None:
        """Waits until the program listens: a Ctrl-C between showing its prompt and listening is lost on readline."""
        self.wait_for("> ")
        if sys.platform == "linux":
            process = psutil.Process(self._process.pid)
            while process.status() == psutil.STATUS_RUNNING:
                time.sleep(0.001)

    def wait_for(self, text: str) -> str:
        """Everything shown up to and with `text`, since the last call. Fails if the program ends before."""
        while text not in self.seen:
            shown = self._read()
            assert shown, f"ended without {text!r}: {self.seen!r}"
            self.seen += shown
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def wait_for_more(self) -> None:
        """Waits until something is shown after what was waited for."""
        if not self.seen:
            self.seen = self._read()
        assert self.seen, "ended"

    def wait(self) -> int:
        """The exit code, once the program has ended; what it still showed is then in `seen`."""
        while shown := self._read():
            self.seen += shown
        return self._process.wait()

    def _read(self) -> str:
        try:
            return os.read(self._master, 65536).decode(errors="replace").replace("\r", "")
        except OSError:  # Linux reports the end of a pseudo-terminal as an error
            return ""


def environment() -> dict[str, str]:
    """This process's environment, able to import the repository, with plain output."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "120", "NO_COLOR": "1"}


def run_program(*arguments: str, stdin: str | None = None, program: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command line to its end; without `stdin`, standard input is empty."""
    return subprocess.run(
        [
            sys.executable,
            "-c",
            program + "import sys; from offload.terminal.main import main; main(sys.argv[1:])",
            *arguments,
        ],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
