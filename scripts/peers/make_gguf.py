"""Write the GGUF file of one of our random checkpoints, for llama.cpp: the same weights, in BF16 or Q4_0.

    python scripts/peers/make_gguf.py /data/olmoe-8l --type Q4_0 --out /data/olmoe-8l.q4_0.gguf

Reads what make_checkpoint.py writes of the families olmoe, qwen3_moe and gpt_oss. Needs only NumPy and PyPI's `gguf`,
so that it can run in llama.cpp's environment. Tensors are converted one after the other. Q4_0 quantises every matrix,
embeddings and output included; routers, norms and biases are F32, as llama.cpp needs them. The file has no tokenizer:
llama.cpp is driven by token ids.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint16]  # of bfloat16 values
Piece = Callable[[], Bits]

ARCHITECTURES = {"olmoe": "olmoe", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss"}
TYPES = ("BF16", "Q4_0")
_Q4_0_BLOCK, _Q4_0_BYTES = 32, 18
_DENSE = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
}
_GPT_OSS_DENSE = _DENSE | {
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.sinks": "attn_sinks",
    "mlp.router": "ffn_gate_inp",
}
_GLOBAL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class Checkpoint:
    """The bfloat16 tensors of a folder of safetensors files, mapped."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self._tensors: dict[str, Bits] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            mapped = np.memmap(path, np.uint8, "r")
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                if entry["dtype"] != "BF16":
                    raise ValueError(f"{name} is {entry['dtype']}: only BF16 checkpoints can be converted")
                begin, end = (8 + size + offset for offset in entry["data_offsets"])
                self._tensors[name] = mapped[begin:end].view("<u2").reshape(entry["shape"])

    def __getitem__(self, name: str) -> Bits:
        return self._tensors[name]

    def names(self) -> Iterator[str]:
        """Every tensor's name."""
        return iter(self._tensors)


@dataclass(frozen=True)
class Target:
    """One tensor of the GGUF file: `pieces`, one below the other, make `shape`."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def is_matrix(self) -> bool:
        """Is it stored in the file's own type, rather than in F32?"""
        return len(self.shape) > 1 and "ffn_gate_inp." not in self.name and not self.name.endswith(".bias")


def targets(checkpoint: Checkpoint) -> Iterator[Target]:
    """The tensors that llama.cpp expects. Raises ValueError for a family that this script does not know."""
    config = checkpoint.config
    if (family := config["model_type"]) not in ARCHITECTURES:
        raise ValueError(f"{family} checkpoints cannot be converted: only {', '.join(ARCHITECTURES)}")
    dense = _GPT_OSS_DENSE if family == "gpt_oss" else _DENSE
    for name in checkpoint.names():
        if ".experts." in name:
            continue
        stem, _, kind = name.rpartition(".")
        if kind == "sinks":
            stem, kind = name, "weight"
        if stem in _GLOBAL:
            gguf_name = f"{_GLOBAL[stem]}.{kind}"
        else:
            layer, part = stem.removeprefix("model.layers.").split(".", 1)
            gguf_name = f"blk.{layer}.{dense[part]}.{kind}"
        yield Target(gguf_name, checkpoint[name].shape, (partial(checkpoint.__getitem__, name),))
    for layer in map(str, range(config["num_hidden_layers"])):
        yield from (_gpt_oss_experts if family == "gpt_oss" else _experts)(checkpoint, layer)


def _experts(checkpoint: Checkpoint, layer: str) -> Iterator[Target]:
    """Experts stored one by one: stacked."""
    count = checkpoint.config["num_experts"]
    for part in ("gate", "up", "down"):
        names = [f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight" for expert in range(count)]
        pieces = tuple(partial(checkpoint.__getitem__, name) for name in names)
        shape = (count, *checkpoint[names[0]].shape)
        yield Target(f"blk.{layer}.ffn_{part}_exps.weight", shape, pieces)


def _gpt_oss_experts(checkpoint: Checkpoint, layer: str) -> Iterator[Target]:
    """Experts stored together and transposed, with gate and up rows in turn."""
    prefix = f"model.layers.{layer}.mlp.experts."
    gate_up, down = checkpoint[prefix + "gate_up_proj"], checkpoint[prefix + "down_proj"]
    gate_up_bias, down_bias = checkpoint[prefix + "gate_up_proj_bias"], checkpoint[prefix + "down_proj_bias"]
    count, hidden, twice = gate_up.shape
    for part, first in (("gate", 0), ("up", 1)):
        pieces = tuple(partial(_transposed, gate_up, expert, first, 2) for expert in range(count))
        yield Target(f"blk.{layer}.ffn_{part}_exps.weight", (count, twice // 2, hidden), pieces)
        bias = partial(gate_up_bias.__getitem__, (slice(None), slice(first, None, 2)))
        yield Target(f"blk.{layer}.ffn_{part}_exps.bias", (count, twice // 2), (bias,))
    pieces = tuple(partial(_transposed, down, expert) for expert in range(count))
    yield Target(f"blk.{layer}.ffn_down_exps.weight", (count, hidden, twice // 2), pieces)
    yield Target(f"blk.{layer}.ffn_down_exps.bias", down_bias.shape, (partial(down_bias.__getitem__, ...),))


def _transposed(stack: Bits, expert: int, first: int = 0, step: int = 1) -> Bits:
    """Every `step`th row of an expert that is stored transposed."""
    rows: Bits = stack[expert].T[first::step]
    return rows


def add_metadata(writer: Any, config: dict[str, Any], kind: str) -> None:
    """What llama.cpp must know of the model beside its tensors."""
    import gguf

    inner = config.get("moe_intermediate_size", config["intermediate_size"])
    experts = config.get("num_experts") or config["num_local_experts"]
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(inner)
    if config["model_type"] == "gpt_oss":
        scaling = config["rope_scaling"]
        writer.add_sliding_window(config["sliding_window"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(scaling["beta_slow"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])


def stored_bytes(target: Target, kind: str) -> int:
    """Bytes of the tensor in the file."""
    values = math.prod(target.shape)
    if not target.is_matrix:
        return 4 * values
    return 2 * values if kind == "BF16" else values // _Q4_0_BLOCK * _Q4_0_BYTES


def encode(bits: Bits, target: Target, kind: str) -> NDArray[np.uint8]:
    """The bytes of a piece of `target`."""
    if target.is_matrix and kind == "BF16":
        return np.ascontiguousarray(bits).reshape(-1).view(np.uint8)
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    if not target.is_matrix:
        return values.reshape(-1).view(np.uint8)
    import gguf

    packed: NDArray[np.uint8] = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_0)
    return packed.reshape(-1)


def _encode_piece(target: Target, kind: str, piece: Piece) -> NDArray[np.uint8]:
    return encode(piece(), target, kind)


def write_gguf(folder: Path, out: Path, kind: str) -> int:
    """Convert the checkpoint in `folder` to the new file `out`; returns its bytes.

    It is written beside `out` and renamed at the end. Raises ValueError for a checkpoint that cannot be converted.
    """
    import gguf

    checkpoint = Checkpoint(folder)
    writer = gguf.GGUFWriter(None, ARCHITECTURES.get(checkpoint.config["model_type"], ""))
    add_metadata(writer, checkpoint.config, kind)
    tensors = list(targets(checkpoint))
    for target in tensors:
        stored = gguf.GGMLQuantizationType[kind if target.is_matrix else "F32"]
        writer.add_tensor_info(target.name, target.shape, np.dtype(np.float32), stored_bytes(target, kind), stored)
    unfinished = out.with_name(f".{out.name}.partial")
    try:
        writer.write_header_to_file(unfinished)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for target in tensors:
                encoded = pool.map(partial(_encode_piece, target, kind), target.pieces)
                writer.write_tensor_data(np.concatenate(list(encoded)))
        writer.close()
        unfinished.rename(out)
    finally:
        unfinished.unlink(missing_ok=True)
    return out.stat().st_size


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path, help="a folder that scripts/bench/make_checkpoint.py wrote")
    parser.add_argument("--type", choices=TYPES, default="BF16", help="of the matrices (default BF16)")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    args = parser.parse_args(argv)
    try:
        size = write_gguf(args.checkpoint, args.out, args.type)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
