"""Safetensors files made wrong: headers that lie, weights of other shapes and kinds, names, and bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from scripts.fuzz.jsons import mutate_field, mutate_text
from scripts.fuzz.values import ANY

INDEX = "model.safetensors.index.json"
PREFIXES = ("module.", "_orig_mod.", "base_model.model.")
_DTYPES: Sequence[Any] = ("C64", "F8_E4M3", "I16", "U16", "F64", "F32", "BF16", "F16", "BOOL", "X9", "", 5, None, "F4")


def mutate_weights(random: Random, folder: Path) -> str:
    """Changes the weights of a checkpoint, or what is said of them; says how."""
    shards = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not shards:
        return "nothing"
    shard, way = random.choice(shards), random.random()
    if way < 0.45:
        return f"{shard.name}: {_mutate_header(random, shard)}"
    if way < 0.7:
        return f"{shard.name}: {_mutate_tensors(random, shard)}"
    if way < 0.8:
        return mutate_text(random, shard)
    if not (folder / INDEX).is_file():
        return "nothing"
    return mutate_text(random, folder / INDEX) if way < 0.85 else _mutate_index(random, folder / INDEX)


def prefix_all(random: Random, folder: Path) -> str:
    """Gives every tensor a prefix that training wrappers leave: the model is the same."""
    prefix = random.choice(PREFIXES)
    for shard in folder.glob("*.safetensors"):
        save_file({prefix + name: tensor for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {prefix + name: shard for name, shard in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    return f"every tensor begins with {prefix}"


def _mutate_index(random: Random, path: Path) -> str:
    if random.random() < 0.4:
        return mutate_field(random, path)
    index = json.loads(path.read_text())
    names = index["weight_map"]
    name = random.choice(sorted(names))
    shard = names[name]
    names[name] = random.choice([f"./{shard}", f"x/{shard}", f"../{shard}", "model.bin", *names.values()])
    path.write_text(json.dumps(index))
    return f"{path.name}: {name} in {names[name]}"


def _mutate_header(random: Random, shard: Path) -> str:
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if random.random() < 0.12:
        wrong = random.choice([0, length - 1, length + 1, 2 * length, 2**31, 2**63, 2**64 - 1])
        shard.write_bytes(wrong.to_bytes(8, "little") + data[8:])
        return f"the header's length is {wrong}"
    said = _change_entry(random, header, len(body))
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    shard.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return said


def _change_entry(random: Random, header: dict[str, Any], nbytes: int) -> str:
    name, other = (random.choice(sorted(set(header) - {"__metadata__"})) for _ in range(2))
    entry = header[name]
    kind = random.choice(["dtype", "shape", "shape", "data_offsets", "name", "none", "more", "swap", "metadata", "any"])
    if kind == "dtype":
        entry["dtype"] = random.choice(_DTYPES)
    elif kind == "shape":
        entry["shape"] = _shape(random, entry["shape"])
    elif kind == "data_offsets":
        first, last = entry["data_offsets"]
        size = last - first
        entry["data_offsets"] = random.choice(
            [[last, first], [first, last + 2], [first + 2, last + 2], [0, size], [nbytes, nbytes + size], [-size, 0]]
        )
    elif kind == "name":
        header[random.choice([f"module.{name}", f"{name}\x1b[31m", f"{name}_scale_inv", other, ""])] = header.pop(name)
    elif kind == "none":
        del header[name]
    elif kind == "more":
        place = random.choice([[0, 0], [0, 4], [nbytes, nbytes]])
        header["more"] = {"dtype": "F32", "shape": [0], "data_offsets": place}
    elif kind == "swap":
        header[name], header[other] = header[other], entry
    elif kind == "metadata":
        header["__metadata__"] = random.choice(ANY)
    else:
        entry[random.choice(sorted(entry))] = random.choice(ANY)
    return f"{kind} of {name}: {json.dumps(header.get(name))[:80]}"


def _shape(random: Random, shape: list[int]) -> list[int]:
    flat = prod(shape)
    others = [shape[::-1], [flat], [1, *shape], [flat // 2, 2], [*shape, 1], [0, *shape], [-n for n in shape]]
    return random.choice(others)


def _mutate_tensors(random: Random, shard: Path) -> str:
    tensors = load_file(shard)
    name = random.choice(sorted(tensors))
    how = random.choice(sorted(_TENSOR))
    tensors[name] = _TENSOR[how](tensors[name]).contiguous()
    if how == "gone":
        del tensors[name]
    if how == "more":
        tensors[random.choice(["more.weight", f"{name}_scale_inv", name.replace("weight", "bias")])] = torch.ones(3)
    save_file(tensors, shard, {"format": "pt"})
    return f"{name} {how}"


_TENSOR: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gone": lambda tensor: tensor,
    "more": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.transpose(0, -1),
    "flat": lambda tensor: tensor.flatten(),
    "cut": lambda tensor: tensor[: len(tensor) // 2],
    "longer": lambda tensor: torch.cat([tensor, tensor]),
    "scalar": lambda tensor: tensor.sum(),
    "in float16": lambda tensor: tensor.half(),
    "in bfloat16": lambda tensor: tensor.bfloat16(),
    "in float32": lambda tensor: tensor.float(),
    "in float64": lambda tensor: tensor.double(),
    "in int16": lambda tensor: tensor.to(torch.int16),
    "in uint8": lambda tensor: (tensor * 10).to(torch.uint8),
    "in float8": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "not a number": lambda tensor: torch.full_like(tensor, torch.nan),
    "infinite": lambda tensor: torch.full_like(tensor, torch.inf),
    "zero": torch.zeros_like,
}
