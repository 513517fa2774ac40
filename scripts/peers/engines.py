"""Who and what peers/bench.py compares: shapes, groups of equal bits, engines, and the files each of them needs."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scripts.bench.common import note
from scripts.bench.families import FAMILIES, Family, tensors
from scripts.bench.make_checkpoint import write_checkpoint
from scripts.bench.storage import need_space
from scripts.bench.workers import engine_command
from scripts.peers.levels import NATIVE, environment

HERE = Path(__file__).resolve().parent
GGUF_TYPES = {"llama.cpp-bf16": "BF16", "llama.cpp-q4_0": "Q4_0"}
AIRLLM = "airllm"
STREAMING = ("accelerate", AIRLLM)
"""Peers that read experts again and again, however much memory there is."""
NOT_ROUTED = "its router cannot be driven"
VOCAB = 32000
_MARGIN_BYTES = 64 << 20  # what a cgroup counts and our budget does not: page tables, the kernel's own
_ROOM_BYTES = 4 << 30  # beyond the model, for ours with everything resident: never met, so that it bounds nothing


@dataclass(frozen=True)
class Group:
    """Engines that read equally many bits a weight. `layers` of each shape make a file of 4 to 6, or about 3 GB."""

    name: str
    bits: float
    ours: str
    peers: tuple[str, ...]
    layers: dict[str, int]
    copies: float  # of the 16-bit checkpoint that all its engines together keep on disk

    @property
    def engines(self) -> tuple[str, ...]:
        return (self.ours, *self.peers)


GROUPS = (
    Group(
        name="16 bits",
        bits=16,
        ours="ours-bf16",
        # transformers late: it may map the checkpoint, whose cached pages are dropped before each engine loads.
        peers=("llama.cpp-bf16", "accelerate", AIRLLM, "transformers"),
        layers={"olmoe": 5, "qwen3-30b-a3b": 4, "gpt-oss-20b": 3},
        copies=4,
    ),
    Group(
        name="4.5 bits",
        bits=4.5,
        ours="ours-nf4",
        peers=("llama.cpp-q4_0",),
        layers={"olmoe": 10, "qwen3-30b-a3b": 7, "gpt-oss-20b": 6},
        copies=1.6,
    ),
)


@dataclass(frozen=True)
class Pythons:
    """The interpreters of the peers that do not run in ours; llama.cpp's is built for `level`, which all keep to."""

    llama: Path
    airllm: Path
    level: str = NATIVE


@dataclass(frozen=True)
class Settings:
    """How engines are loaded. Without `memory_bytes` everything stays in RAM.

    `ubatch`: tokens that llama.cpp computes in one pass. `ours`: options of `from_pretrained`.
    """

    threads: int
    context: int
    memory_bytes: int | None
    ubatch: int = 512
    ours: Mapping[str, Any] = field(default_factory=dict)


class Files:
    """One random checkpoint in `folder`, and whatever is made of it; what is there already is used again."""

    def __init__(self, shape: str, layers: int, folder: Path, *, small: dict[str, int] | None = None) -> None:
        self.family: Family = replace(FAMILIES[shape], layers=layers, vocab=VOCAB, token_ids={}, **(small or {}))  # type: ignore[arg-type]
        self.shape = shape
        self.folder = folder
        self.checkpoint = folder / "model"

    def model_bytes(self, bits: float) -> int:
        """All weights at so many bits."""
        return int(sum(tensor.values for tensor in tensors(self.family)) * bits / 8)

    def expert_bytes(self, bits: float) -> int:
        """One expert's three matrices at so many bits."""
        return int(3 * self.family.hidden * self.family.intermediate * bits / 8)

    def write(self, copies: float) -> None:
        """The checkpoint. Raises DiskSpaceError where `copies` of it do not fit."""
        if self.checkpoint.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        need_space(self.folder, int(copies * self.model_bytes(16)), "choose another --work")
        note(f"writing {self.checkpoint}")
        write_checkpoint(self.family, self.checkpoint)

    def prepare(self, engine: str, pythons: Pythons) -> str | None:
        """Write what `engine` needs beside the checkpoint; why it cannot run, or None."""
        if kind := GGUF_TYPES.get(engine):
            if why := lacks(pythons.llama, "llama_cpp", "gguf"):
                return why
            if not self._gguf(kind).exists():
                note(f"writing {self._gguf(kind)}")
                return _failure(gguf_command(pythons.llama, self.checkpoint, kind, self._gguf(kind)))
        elif engine == AIRLLM:
            self._of(engine).mkdir(exist_ok=True)
            return lacks(pythons.airllm, "airllm")
        elif engine == "accelerate" and self._is_mapped and not self._of("copy").exists():
            note("copying the checkpoint for accelerate")
            shutil.copytree(self.checkpoint, self._of("copy"))
        elif engine == "ours-nf4":
            from offload.options import PlanOptions
            from offload.plan.conversion import convert_model

            note("converting experts to nf4")
            options = PlanOptions(experts="nf4", expert_store=self._of(engine))
            convert_model(self.checkpoint, options, progress=sys.stderr.isatty())
        return None

    def command(self, engine: str, pythons: Pythons, settings: Settings) -> list[str]:
        """The worker's command line."""
        level = [f"{name}={value}" for name, value in environment(pythons.level).items()]
        return [*(["env", *level] if level else []), *self._command(engine, pythons, settings)]

    def _command(self, engine: str, pythons: Pythons, settings: Settings) -> list[str]:
        threads = settings.threads
        if kind := GGUF_TYPES.get(engine):
            # llama.cpp rounds a context up to this by itself.
            rounded = math.ceil(settings.context / 256) * 256
            arguments: list[object] = [pythons.llama, HERE / "llama_worker.py", self._gguf(kind)]
            arguments += ["--context", rounded, "--ubatch", settings.ubatch, "--threads", threads]
            return [*map(str, arguments), *(["--resident"] if settings.memory_bytes is None else [])]
        if engine == AIRLLM:
            arguments = [pythons.airllm, HERE / "airllm_worker.py", self.checkpoint, "--layers", self._of(engine)]
            return [*map(str, arguments), "--threads", str(threads)]
        if engine == "transformers":
            return engine_command(engine, self.checkpoint, threads=threads)
        if engine == "accelerate":
            checkpoint = self._of("copy") if self._is_mapped else self.checkpoint
            return engine_command(engine, checkpoint, threads=threads, folder=self._of(engine))
        options: dict[str, Any] = {"device": "cpu", "context": settings.context}
        if settings.memory_bytes is None:
            options["cpu_mem"] = self.model_bytes(16) + _ROOM_BYTES
        else:
            options["cpu_mem"] = settings.memory_bytes - _MARGIN_BYTES
        if engine == "ours-nf4":
            options |= {"experts": "nf4", "dense": "nf4", "expert_store": self._of(engine)}
        return engine_command("offload", self.checkpoint, threads=threads, **options | dict(settings.ours))

    def all(self) -> list[Path]:
        """Every file there is now."""
        return [path for path in self.folder.rglob("*") if path.is_file()]

    def remove(self) -> None:
        """Delete them all."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _is_mapped(self) -> bool:
        """Do transformers and accelerate map these files as they are, rather than fuse experts first?

        Then one would be served from pages that are on the other's account: each gets files of its own.
        """
        return self.family.model_type == "gpt_oss"

    def _gguf(self, kind: str) -> Path:
        return self.folder / f"{kind}.gguf"

    def _of(self, engine: str) -> Path:
        return self.folder / engine


def gguf_command(python: Path, checkpoint: Path, kind: str, out: Path) -> list[str]:
    """What writes llama.cpp's file of a checkpoint."""
    return [str(python), str(HERE / "make_gguf.py"), str(checkpoint), f"--type={kind}", f"--out={out}"]


def lacks(python: Path, *modules: str) -> str | None:
    """What `python` says when it cannot import `modules`; None when it can."""
    return _failure([str(python), "-c", f"import {', '.join(modules)}"])


def _failure(command: list[str]) -> str | None:
    """The last line that a command which fails says, None when it does not."""
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    if not done.returncode:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
