"""A small stock model as one .safetensors file in int8, and back as a checkpoint in bfloat16.

    <matrix>              int8, as the stock class in memory has it
    <matrix>.step         float16 without the last dimension: what one unit of a row's values is worth
    <other weight>        float16: norms and routers
    config, tokenizer     uint8: config.json and tokenizer.json, compressed with zlib

Metadata: `format`, `version`. scripts/mixture/main.py writes such files.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cache.errors import CheckpointError

FORMAT = "offload-int8-model"
VERSION = "1"
_FILES = ("config", "tokenizer")
_PLAIN = ("mlp.gate.weight", "norm.weight")  # ends of the names of what stays float16


def quantise(values: torch.Tensor, dim: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 values, float32 step per rank): symmetric, the largest of each rank's values along `dim` becoming 127."""
    step = values.abs().amax(dim=dim, keepdim=True).clamp_min(1e-12) / 127
    return (values / step).round().to(torch.int8), step.squeeze(dim).float()


def pack(model: Any, tokenizer: Path, path: Path) -> int:
    """Write a stock model and its tokenizer.json to `path`, atomically; returns the file's bytes."""
    files = {"config": model.config.to_json_string().encode(), "tokenizer": tokenizer.read_bytes()}
    tensors = {
        name: torch.frombuffer(bytearray(zlib.compress(content, 9)), dtype=torch.uint8)
        for name, content in files.items()
    }
    for name, weight in model.named_parameters():
        if name.endswith(_PLAIN):
            tensors[name] = weight.detach().half()
            continue
        tensors[name], step = quantise(weight.detach().float())
        tensors[f"{name}.step"] = step.half()
    part = path.with_suffix(".part")
    save_file(tensors, part, {"format": FORMAT, "version": VERSION})
    part.replace(path)
    return path.stat().st_size


def unpack(path: Path, folder: Path) -> None:
    """Write the packed model as a checkpoint. Raises CheckpointError when it is not of this format and version."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
        if (about.get("format"), about.get("version")) != (FORMAT, VERSION):
            raise CheckpointError(f"{path.name} is not an int8 model of version {VERSION}: reinstall offload")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config, tokenizer = (zlib.decompress(tensors.pop(name).numpy().tobytes()) for name in _FILES)
    said = json.loads(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**said), dtype=torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            step = tensors.get(f"{name}.step")
            weight.copy_(tensors[name].float() * (1 if step is None else step.float()[..., None]))
    write_checkpoint(model, tokenizer.decode(), folder)


def write_checkpoint(model: Any, tokenizer: str, folder: Path) -> None:
    """Write a stock model as it is and its tokenizer.json, whose first token begins and ends a text, into `folder`."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    known = Tokenizer.from_str(tokenizer)
    end = known.id_to_token(0)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=known, bos_token=end, eos_token=end).save_pretrained(folder)
