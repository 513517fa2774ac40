"""Tensors that are not the model's are found from headers: shapes, types, names, and scales that nothing would use."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import tiny_quantized
import torch

from cache.errors import CheckpointError, UnsupportedFamilyError
from offload.options import PlanOptions
from offload.plan.prepare import make_plan
from tests.offload.checkpoint.headers import Entry, edit_header, flatten, reshape, retype, turn

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)

EXPERTS = r"layers\.1\.mlp\.experts\.\d+\."
Tensors = dict[str, torch.Tensor]


def refusal(folder: Path) -> str:
    """How a plan refuses the checkpoint: in one line, before a weight is read."""
    with pytest.raises(CheckpointError) as caught:
        make_plan(folder, PlanOptions(cpu_mem="8G", device="cpu"))
    message = str(caught.value)
    assert "\n" not in message
    return message


def notes(folder: Path) -> tuple[str, ...]:
    """What a plan has to say of the checkpoint."""
    return make_plan(folder, PlanOptions(cpu_mem="8G", device="cpu")).notes


@pytest.mark.parametrize("edit", [turn, flatten, reshape])
@pytest.mark.parametrize(
    ("name", "tensor", "parameter"),
    [
        ("qwen3_moe", EXPERTS + "gate_proj", "layers.1.mlp.experts.gate_up_proj"),
        ("qwen3_moe", EXPERTS + "down_proj", "layers.1.mlp.experts.down_proj"),
        ("gpt_oss", r"layers\.1\.mlp\.experts\.down_proj$", "layers.1.mlp.experts.down_proj"),
        ("gpt_oss", r"layers\.1\.mlp\.experts\.gate_up_proj$", "layers.1.mlp.experts.gate_up_proj"),
        ("granitemoehybrid", r"layers\.1\.block_sparse_moe\.input_linear", "layers.1.block_sparse_moe.experts"),
        ("qwen3_moe", r"layers\.1\.self_attn\.k_proj", "layers.1.self_attn.k_proj.weight"),
        ("qwen3_moe", "embed_tokens", "model.embed_tokens.weight"),
        ("qwen3_moe", "lm_head", "lm_head.weight"),
        ("kimi_linear", r"layers\.0\.self_attn\.[qkv]_conv1d", "layers.0.self_attn.conv1d.weight"),  # one of three
    ],
)
def test_the_same_bytes_in_another_shape(
    name: str, tensor: str, parameter: str, edit: Callable[[Entry], None], tmp_path: Path
) -> None:
    edit_header(tiny.save(tmp_path, name), tensor, edit)
    message = refusal(tmp_path)
    assert parameter in message and "config.json and the weights do not belong together" in message


@pytest.mark.parametrize("shape", [[1, 64], [64, 1]])
def test_a_norm_with_a_dimension_more(shape: list[int], tmp_path: Path) -> None:
    edit_header(tiny.save(tmp_path, "qwen3_moe"), r"model\.norm", lambda entry: entry.update(shape=shape))
    assert f"model.norm.weight is {shape} on disk and [64] in the model" in refusal(tmp_path)


@pytest.mark.parametrize("dtype", ["I16", "U16"])
@pytest.mark.parametrize("tensor", ["q_proj", "embed_tokens", "lm_head", r"model\.norm", EXPERTS + "gate_proj"])
def test_integers_where_the_model_has_fractions(dtype: str, tensor: str, tmp_path: Path) -> None:
    edit_header(tiny.save(tmp_path, "qwen3_moe", torch.bfloat16), tensor, retype(dtype))
    assert f"is {dtype} on disk and bfloat16 in the model" in refusal(tmp_path)


@pytest.mark.parametrize("tensor", ["q_proj", "embed_tokens", EXPERTS + "gate_proj", "."])
def test_a_type_without_numbers_of_ours(tensor: str, tmp_path: Path) -> None:
    edit_header(tiny.save(tmp_path, "qwen3_moe", torch.float64), tensor, retype("C64"))
    assert "is stored as C64, which is not read" in refusal(tmp_path)


def test_a_type_of_a_tensor_that_nothing_needs_does_not_matter(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8, dtype=torch.float64)}
    tiny.edit_tensors(tiny.save(tmp_path, "qwen3_moe"), lambda tensors: tensors.update(extra))
    edit_header(tmp_path, "inv_freq", retype("C64"))
    assert notes(tmp_path) == ()


@pytest.mark.parametrize("dtype", ["F8_E4M3FNUZ", "F8_E5M2FNUZ"])
def test_types_of_eight_bits_are_read_as_transformers_reads_them(dtype: str, tmp_path: Path) -> None:
    def cast(tensors: Tensors) -> None:
        tensors.update({name: t.to(torch.float8_e4m3fn) for name, t in tensors.items() if "k_proj" in name})

    tiny.edit_tensors(tiny.save(tmp_path, "qwen3_moe"), cast)
    edit_header(tmp_path, "k_proj", retype(dtype))
    inputs = tiny.ids(1, 6)
    with tiny.open_model(tmp_path) as model, torch.no_grad():
        assert tiny.same_bits(model(inputs).logits, tiny.resident(tmp_path)(inputs).logits)


@pytest.mark.parametrize("suffix", [".weight_scale_inv", ".weight_scale"])
def test_scales_without_a_word_in_the_configuration(suffix: str, tmp_path: Path) -> None:
    tiny_quantized.save_fp8(tmp_path, "qwen3_moe", suffix=suffix)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert f"F8_E4M3 with model.layers.0.mlp.experts.0.down_proj{suffix} beside it" in refusal(tmp_path)


def test_scales_of_weights_that_are_numbers_already_are_only_named(tmp_path: Path) -> None:
    scale = "model.layers.0.self_attn.q_proj.weight_scale"
    tiny.edit_tensors(tiny.save(tmp_path, "qwen3_moe"), lambda tensors: tensors.update({scale: torch.ones(1)}))
    (note,) = notes(tmp_path)
    assert note.endswith("are not used: model.layers.*.self_attn.q_proj.weight_scale")


FORMS = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "packed, as compressed-tensors writes it",
    ".weight_scale_2": "NVFP4, as ModelOpt writes it",
}


@pytest.mark.parametrize("suffix", FORMS)
def test_forms_that_the_configuration_does_not_name(suffix: str, tmp_path: Path) -> None:
    def pack(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name.removesuffix(".weight") + suffix] = torch.zeros(8, dtype=torch.uint8)
            if suffix != ".weight_scale_2":
                del tensors[name]

    tiny.edit_tensors(tiny.save(tmp_path, "qwen3_moe"), pack)
    with pytest.raises(UnsupportedFamilyError, match=f"not read \\({FORMS[suffix]}"):
        notes(tmp_path)


def test_tensors_that_nothing_uses_are_named_in_one_line(tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors.update({n.replace("weight", "bias"): t[:, 0].clone() for n, t in tensors.items() if "q_proj" in n})

    tiny.edit_tensors(tiny.save(tmp_path, "qwen3_moe"), add)
    line = (
        "3 tensors of the checkpoint have no place in the model and are not used: model.layers.*.self_attn.q_proj.bias"
    )
    assert notes(tmp_path) == (f"{line} (3)",)
    with pytest.warns(UserWarning, match="3 tensors of the checkpoint have no place in the model"):
        tiny.open_model(tmp_path).close()


HARMLESS = {
    "rotary frequencies": ("qwen3_moe", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    "multi-token prediction": ("qwen3_next", "mtp.layers.0.mlp.gate.weight"),
    "multi-token prediction, of which the family says nothing": ("qwen3_moe", "mtp.fc.weight"),
    "a layer behind the last": ("deepseek_v3", "model.layers.3.mlp.gate.weight"),
    "scales of a cache": ("qwen3_moe", "model.layers.0.self_attn.k_proj.k_scale"),
}


@pytest.mark.parametrize("what", HARMLESS)
def test_what_is_known_to_be_harmless_is_not_named(what: str, tmp_path: Path) -> None:
    name, tensor = HARMLESS[what]
    tiny.edit_tensors(tiny.save(tmp_path, name), lambda tensors: tensors.update({tensor: torch.ones(8)}))
    assert notes(tmp_path) == ()


def test_a_layer_behind_the_last_of_a_family_without_such_layers_is_named(tmp_path: Path) -> None:
    extra = {"model.layers.3.mlp.gate.weight": torch.ones(8)}
    tiny.edit_tensors(tiny.save(tmp_path, "qwen3_moe"), lambda tensors: tensors.update(extra))
    assert "model.layers.*.mlp.gate.weight" in notes(tmp_path)[0]


def test_a_head_that_is_not_there_may_be_the_embedding(tmp_path: Path) -> None:
    """transformers takes random numbers for it."""
    tiny.edit_tensors(tiny.save(tmp_path, "qwen3_moe"), lambda tensors: tensors.pop("lm_head.weight"))
    assert 'lm_head.weight for one: where the output head is the embedding, set "tie_word_embeddings": true' in refusal(
        tmp_path
    )
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.open_model(tmp_path).close()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.gate.weight"])
def test_a_missing_weight_is_found_by_a_plan(name: str, tmp_path: Path) -> None:
    tiny.edit_tensors(tiny.save(tmp_path, "qwen3_moe"), lambda tensors: tensors.pop(name))
    assert f"1 weights of the model are not in the checkpoint, {name} for one: it is incomplete" in refusal(tmp_path)


def test_what_transformers_does_without_is_not_missing(tmp_path: Path) -> None:
    """Older checkpoints of this family have no corrections: they are zeros then."""

    def older(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("e_score_correction_bias")]:
            del tensors[name]

    tiny.edit_tensors(tiny.save(tmp_path, "axk1"), older)
    inputs = tiny.ids(1, 6)
    with tiny.open_model(tmp_path) as model, torch.no_grad():
        assert tiny.same_bits(model(inputs).logits, tiny.resident(tmp_path)(inputs).logits)


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_of_tied_weights_one_is_enough(kept: str, tmp_path: Path) -> None:
    def keep(tensors: Tensors) -> None:
        tensors[kept] = tensors.pop("model.embed_tokens.weight")

    tiny.edit_tensors(tiny.save(tmp_path, "qwen3_moe", tie_word_embeddings=True), keep)
    inputs = tiny.ids(1, 6)
    with tiny.open_model(tmp_path) as model, torch.no_grad():
        assert tiny.same_bits(model(inputs).logits, tiny.resident(tmp_path)(inputs).logits)
