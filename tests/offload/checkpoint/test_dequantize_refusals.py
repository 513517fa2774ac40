"""Checkpoints that come quantised in another way, or incomplete, are refused by their headers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import tiny_quantized
import torch

from cache.errors import CheckpointError, UnsupportedFamilyError
from offload.checkpoint.hub.files import describe
from offload.decide.preset import DEFAULT
from offload.options import PlanOptions
from offload.plan.conversion import convert_model
from offload.plan.prepare import prepare


def test_dense_weights_of_bitsandbytes_in_another_shape(tmp_path: Path) -> None:
    """Which only their bytes say, so a load finds it, not a plan."""
    import bitsandbytes.functional

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if "k_proj" in key]:
            turned = tensors[key].t().contiguous()
            tensors[key], state = bitsandbytes.functional.quantize_4bit(turned, quant_type="nf4")
            tensors.update({f"{key}.{name}": value for name, value in state.as_dict(packed=True).items()})

    tiny.edit_tensors(tiny.save(tmp_path, "qwen3_moe", torch.bfloat16), quantise)
    tiny_quantized.say(tmp_path, quant_method="bitsandbytes", load_in_4bit=True)
    with pytest.raises(CheckpointError, match=r"k_proj\.weight is \[64, 32\] on disk and \[32, 64\] in the model"):
        tiny.open_model(tmp_path)


def test_experts_of_bitsandbytes_are_refused(tmp_path: Path) -> None:
    import bitsandbytes.functional

    tiny.save(tmp_path, "qwen3_moe", torch.bfloat16)

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if ".experts." in key]:
            tensors[key], state = bitsandbytes.functional.quantize_4bit(tensors[key], quant_type="nf4")
            tensors |= {f"{key}.{part}": value for part, value in state.as_dict(packed=True).items()}

    tiny.edit_tensors(tmp_path, quantise)
    tiny_quantized.say(tmp_path, quant_method="bitsandbytes", load_in_4bit=True)
    with pytest.raises(UnsupportedFamilyError, match=r"bitsandbytes 4-bit.*bf16 checkpoint with --experts nf4"):
        tiny_quantized.read(tmp_path)


REFUSED = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "bitsandbytes 8-bit": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "NVFP4 by ModelOpt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "FP8 by ModelOpt": {"producer": {"name": "modelopt", "version": "0.23"}, "quant_algo": "FP8"},
    "NVFP4 in compressed-tensors": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
    "unheard of": {"quant_method": "unheard of"},
    "unknown": {"bits": 4},
}


@pytest.mark.parametrize("method", REFUSED)
def test_other_methods_are_refused_by_name(method: str, tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_moe")
    tiny_quantized.say(tmp_path, **REFUSED[method])
    with pytest.raises(UnsupportedFamilyError, match=f"not read \\({method}\\): use its bf16") as refusal:
        prepare(describe(tmp_path), PlanOptions(), DEFAULT)
    assert "\n" not in str(refusal.value)
    with pytest.raises(UnsupportedFamilyError, match=f"not read \\({method}\\)"):
        convert_model(tmp_path, PlanOptions(experts="nf4", expert_store=tmp_path / "store"))


def test_a_config_that_cannot_be(tmp_path: Path) -> None:
    tiny_quantized.save_fp8(tmp_path, "qwen3_moe")
    tiny_quantized.say(tmp_path, quant_method="fp8", weight_block_size=[128])
    with pytest.raises(CheckpointError, match=r"quantization_config in config\.json cannot be read"):
        tiny_quantized.read(tmp_path)


Edit = Callable[[dict[str, torch.Tensor]], object]


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


ATTENTION = "model.layers.1.self_attn.q_proj.weight"


def without(*words: str) -> Edit:
    """Removes tensors whose names have all of these words."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if all(word in key for word in words)]:
            tensors.pop(key)

    return edit


DAMAGES: dict[str, tuple[Edit, str]] = {
    "one expert's scale is missing": (without(EXPERT, "_scale_inv"), r"7 tensors on disk.*8 experts"),
    "a layer's scales are missing": (without("layers.1", "up_proj", "_scale_inv"), r"layers\.1.*F8_E4M3.*comes alone"),
    "a layer's weights are missing": (
        lambda tensors: [tensors.pop(k) for k in list(tensors) if "layers.1" in k and k.endswith("up_proj.weight")],
        r"layers\.1.*comes alone",
    ),
    "scales of another shape": (
        lambda tensors: tensors.update(
            {k: torch.ones(3, 3) for k in tensors if "layers.1" in k and k.endswith("up_proj.weight_scale_inv")}
        ),
        r"layers\.1.*does not make.*do not belong together",
    ),
    "a dense scale is missing": (without(ATTENTION, "_scale_inv"), rf"{ATTENTION} \(F8_E4M3\) has no scales"),
    "a dense scale has another shape": (
        lambda tensors: tensors.update({f"{ATTENTION}_scale_inv": torch.ones(3, 3)}),
        f"{ATTENTION}.*scales have",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_incomplete_checkpoints_are_found_from_headers(damage: str, tmp_path: Path) -> None:
    edit, message = DAMAGES[damage]
    tiny_quantized.save_fp8(tmp_path, "qwen3_moe")
    tiny.edit_tensors(tmp_path, edit)
    with pytest.raises(CheckpointError, match=message) as failure:
        tiny_quantized.read(tmp_path)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("layers.1", "down_proj_scales"), "comes alone"),
        (without("layers.1", "down_proj_blocks"), "comes alone"),
        (
            lambda tensors: tensors.update(
                {k: t[:, :, :1].clone() for k, t in tensors.items() if "layers.1" in k and "down_" in k and t.dim() > 2}
            ),
            "does not make",
        ),
    ],
)
def test_incomplete_mxfp4_is_found_from_headers(edit: Edit, message: str, tmp_path: Path) -> None:
    tiny_quantized.save_mxfp4(tmp_path)
    tiny.edit_tensors(tmp_path, edit)
    with pytest.raises(CheckpointError, match=message):
        tiny_quantized.read(tmp_path)
