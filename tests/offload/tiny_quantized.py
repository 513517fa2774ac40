"""Tiny checkpoints that come quantised, written tensor by tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from families import families
from transformers import AutoConfig

from cache.types import ExpertKey
from offload.checkpoint.mapping import Checkpoint, read_checkpoint
from offload.checkpoint.shards import ShardIndex
from offload.checkpoint.skeleton import expert_parameters
from offload.engine.hook import IMPLEMENTATION
from offload.layers.loading import load_dense
from offload.store.plain import CheckpointSlice

LARGEST_FP8 = 448.0
Tensors = dict[str, torch.Tensor]


def read(folder: Path, dtype: str = "auto") -> Checkpoint:
    """What the checkpoint in `folder` says of itself."""
    return read_checkpoint(folder.name, folder, ShardIndex.from_folder(folder), dtype)


def say(folder: Path, **quantization: Any) -> None:
    """Put a quantization_config into config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization}))


def blocks(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in FP8 and the float32 scale of each of its blocks; those at the edges may be smaller."""
    spread = torch.Size(weight.shape)
    grid = [-(-n // b) for n, b in zip(spread, block, strict=True)]
    scale = torch.empty(grid)
    packed = torch.empty(spread, dtype=torch.float8_e4m3fn)
    for i in range(grid[0]):
        for j in range(grid[1]):
            here = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            values = weight[here].float()
            scale[i, j] = values.abs().max() / LARGEST_FP8
            packed[here] = (values / scale[i, j]).to(torch.float8_e4m3fn)
    return packed, scale


def numbers(packed: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """What `blocks` wrote, in bfloat16."""
    spread = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return (packed.float() * spread[: packed.shape[0], : packed.shape[1]]).to(torch.bfloat16)


def is_linear(name: str) -> bool:
    """Whether FP8 checkpoints quantise the tensor called so: projections, no embeddings, routers or norms."""
    return re.search(r"(_proj|_proj_with_mqa|\.w[123]|_[ab])\.weight$", name) is not None


def save_fp8(
    folder: Path,
    name: str,
    block: tuple[int, int] = (8, 16),
    scales: Callable[[torch.Tensor], torch.Tensor] = lambda scale: scale,
    suffix: str = ".weight_scale_inv",
    **config: Any,
) -> Path:
    """A model of family `name` with FP8 projections; `scales` turns their float32 scales into what is stored, under the
    projection's name with `suffix`."""
    tiny.save(folder, name, torch.bfloat16, **config)

    def quantise(tensors: Tensors) -> None:
        for key in list(filter(is_linear, tensors)):
            tensors[key], scale = blocks(tensors[key], block)
            tensors[key.removesuffix(".weight") + suffix] = scales(scale)

    tiny.edit_tensors(folder, quantise)
    say(folder, quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=block)
    return folder


def save_fp4(folder: Path) -> Path:
    """Experts as bytes of two FP4 numbers with a power of two for 32 of them, everything else in FP8 blocks."""
    save_fp8(folder, "qwen3_moe")
    generator = torch.Generator().manual_seed(4)

    def quantise(tensors: Tensors) -> None:
        for key in [key for key in tensors if ".experts." in key and key.endswith(".weight")]:
            rows, columns = tensors[key].shape
            tensors[key] = torch.randint(-128, 128, (rows, columns // 2), generator=generator).to(torch.int8)
            exponents = torch.randint(121, 125, (rows, columns // 32), generator=generator).to(torch.uint8)
            tensors[f"{key}_scale_inv"] = exponents.view(torch.float8_e8m0fnu)

    tiny.edit_tensors(folder, quantise)
    return folder


def save_mxfp4(folder: Path, **config: Any) -> Path:
    """gpt-oss with the experts' matrices in MXFP4, transposed as it has them."""
    tiny.save(folder, "gpt_oss", torch.bfloat16, **config)
    generator = torch.Generator().manual_seed(4)

    def quantise(tensors: Tensors) -> None:
        for key in [key for key in tensors if re.search(r"experts\.(gate_up|down)_proj$", key)]:
            experts, inputs, outputs = tensors.pop(key).shape
            shape = (experts, outputs, inputs // 32)
            tensors[f"{key}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
            tensors[f"{key}_scales"] = torch.randint(120, 125, shape, generator=generator).to(torch.uint8)

    tiny.edit_tensors(folder, quantise)
    say(folder, quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "lm_head"])
    return folder


def save_plain(folder: Path, resident: Any) -> Path:
    """The numbers of `resident`, which transformers dequantised, as a bfloat16 checkpoint that never was quantised."""
    config = AutoConfig.for_model(**{**resident.config.to_dict(), "quantization_config": None})
    del config.quantization_config
    model = type(resident)._from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(resident.state_dict())
    model.save_pretrained(folder)
    return folder


def resident(folder: Path, config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """As transformers loads it, dequantised."""
    family = families()[AutoConfig.from_pretrained(folder).model_type]
    return family.resident(folder, dtype, quantization_config=config)


def wrong_experts(checkpoint: Checkpoint, expected: Any) -> list[str]:
    """The parameters of experts that are not, bit for bit, those of the model `expected`."""
    experts = checkpoint.experts
    reader = CheckpointSlice(experts).open()
    wrong = []
    for layer in experts.layers:
        module = expected.get_submodule(layer.path)
        for expert in range(layer.num_experts):
            slot = tiny.aligned(experts.slot_bytes)
            reader.read(ExpertKey(layer.index, expert), slot)
            for name, view in layer.views(slot).items():
                if not tiny.same_bits(view, getattr(module, name)[expert].detach()):
                    wrong.append(f"{layer.path}.{name}[{expert}]")
    reader.close()
    return wrong


def load(folder: Path, checkpoint: Checkpoint) -> Any:
    """Everything but the experts."""
    device = torch.device("cpu")
    return load_dense(folder, checkpoint.config, checkpoint.experts, checkpoint.dtype, device, IMPLEMENTATION)


def wrong_dense(model: Any, checkpoint: Checkpoint, expected: Any) -> list[str]:
    """The other tensors that are not those of the model `expected`."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    theirs = dict(expected.named_parameters()) | dict(expected.named_buffers())
    routed = {
        f"{layer.path}.{name}"
        for layer in checkpoint.experts.layers
        for name in expert_parameters(expected.get_submodule(layer.path))
    }
    assert tensors.keys() == theirs.keys() - routed
    assert [key for key, tensor in tensors.items() if tensor.data_ptr() % 64 and tensor.numel() > 1] == []
    assert [key for key, tensor in tensors.items() if tensor.requires_grad != theirs[key].requires_grad] == []
    # transformers dequantises into bfloat16 and leaves the rest as it is, even what a family has in float32.
    wide = {key for key, tensor in tensors.items() if tensor.dtype == torch.float32}
    expected_tensors = {key: tensor.float() if key in wide else tensor for key, tensor in theirs.items()}
    return [key for key in tensors if not tiny.same_bits(tensors[key].detach(), expected_tensors[key].detach())]
