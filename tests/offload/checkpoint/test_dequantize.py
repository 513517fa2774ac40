"""Checkpoints that come quantised: the numbers are those of transformers' own dequantised load, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_quantized
import torch
from families import families
from transformers import BitsAndBytesConfig, FineGrainedFP8Config, Mxfp4Config

from cache.types import ExpertKey
from offload.checkpoint import dequantize as quantized
from offload.checkpoint.hub.files import describe
from offload.decide.preset import DEFAULT
from offload.layers.embedding import DiskEmbedding
from offload.options import PlanOptions
from offload.plan.conversion import convert_model
from offload.plan.prepare import prepare
from offload.store.plain import CheckpointSlice, bounce_bytes

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)


def powers(scale: torch.Tensor) -> torch.Tensor:
    """Scales as powers of two, in a type that has nothing else."""
    return torch.exp2(scale.log2().round()).to(torch.float8_e8m0fnu)


def save_with_bytes(folder: Path) -> Path:
    """As MXFP8 checkpoints have them, scales are exponents in bytes."""
    tiny_quantized.save_fp8(folder, "qwen3_moe", (1, 32), lambda scale: powers(scale).view(torch.uint8))
    tiny_quantized.say(folder, quant_method="mxfp8", weight_block_size=[1, 32], scale_fmt="ue8m0")
    return folder


FP8, MXFP4 = FineGrainedFP8Config(dequantize=True), Mxfp4Config(dequantize=True)
Save = Callable[[Path], Path]
FORMS: dict[str, tuple[Save, Any]] = {
    "fp8": (lambda folder: tiny_quantized.save_fp8(folder, "qwen3_moe"), FP8),
    "fp8, shared experts and low ranks": (lambda folder: tiny_quantized.save_fp8(folder, "deepseek_v3", (8, 8)), FP8),
    "fp8, other names": (lambda folder: tiny_quantized.save_fp8(folder, "mixtral"), FP8),
    "fp8, scales of a type of their own": (lambda folder: tiny_quantized.save_fp8(folder, "olmoe", scales=powers), FP8),
    "fp8, scales of another name": (
        lambda folder: tiny_quantized.save_fp8(folder, "deepseek_v4", (8, 8), powers, suffix=".scale"),
        FP8,
    ),
    "mxfp8": (save_with_bytes, FP8),
    "fp4 experts": (tiny_quantized.save_fp4, FP8),
    "mxfp4": (tiny_quantized.save_mxfp4, MXFP4),
}


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A quantised checkpoint, and what makes transformers dequantise it."""
    save, config = FORMS[request.param]
    return save(tmp_path_factory.mktemp("quantised")), config


@pytest.fixture(params=[2**18, 256], ids=["whole", "bands"])
def bands(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiny matrices dequantised at once, and in several bands."""
    monkeypatch.setattr(quantized, "_BAND_NUMBERS", request.param)


@pytest.mark.usefixtures("bands")
def test_all_weights_are_those_of_transformers(form: tuple[Path, Any]) -> None:
    folder, config = form
    checkpoint, expected = tiny_quantized.read(folder), tiny_quantized.resident(folder, config)
    assert checkpoint.dtype is torch.bfloat16
    assert any(parameter.is_quantized for layer in checkpoint.experts.layers for parameter in layer.parameters)
    assert tiny_quantized.wrong_experts(checkpoint, expected) == []
    model = tiny_quantized.load(folder, checkpoint)
    assert tiny_quantized.wrong_dense(model, checkpoint, expected) == []
    assert not hasattr(model.config, "quantization_config") and not getattr(model, "is_quantized", False)


def test_experts_in_another_dtype_are_those_of_transformers(form: tuple[Path, Any]) -> None:
    folder, config = form
    expected = tiny_quantized.resident(folder, config, torch.float32)
    checkpoint = tiny_quantized.read(folder, "float32")
    matrices = [name for name in tiny_quantized.wrong_experts(checkpoint, expected) if "bias" not in name]
    assert matrices == []


def test_every_weight_has_the_dtype_that_was_asked_for(form: tuple[Path, Any]) -> None:
    folder, _ = form
    checkpoint = tiny_quantized.read(folder, "float32")
    assert {parameter.dtype for parameter in tiny_quantized.load(folder, checkpoint).parameters()} == {torch.float32}


def test_generating_is_as_with_everything_resident(form: tuple[Path, Any]) -> None:
    folder, config = form
    expected = tiny_quantized.resident(folder, config)
    prompt = tiny.ids(1, 12)
    with tiny.open_model(folder, expert_cache="100KB") as model:
        assert tiny.same_bits(model(prompt).logits, expected(prompt).logits.detach())
        reply = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert reply.tolist() == expected.generate(prompt, max_new_tokens=12, do_sample=False).tolist()


def on_disk(embedding: torch.nn.Module) -> int:
    """Bytes of embeddings that are in no memory."""
    return int(embedding.weight.nbytes) if isinstance(embedding, DiskEmbedding) else 0


def test_a_plan_counts_what_will_be_in_memory(form: tuple[Path, Any], tmp_path: Path) -> None:
    folder, config = form
    plain = tiny_quantized.save_plain(tmp_path, tiny_quantized.resident(folder, config))
    plans = []
    for each in (folder, plain):
        prepared = prepare(describe(each), PlanOptions(device="cpu", cpu_mem="8G", context=256), DEFAULT)
        prepared.device.close()
        plans.append(({what: nbytes for what, _, nbytes, _ in prepared.plan.rows()}, prepared.experts))
    (rows, experts), (plain_rows, plain_experts) = plans
    dense, plain_dense = (
        each["dense weights"] + on_disk(model.layers[0].model.get_input_embeddings())
        for each, model in ((rows, experts), (plain_rows, plain_experts))
    )
    assert dense == plain_dense
    for what in ("KV cache", "workspace"):
        assert rows[what] == plain_rows[what]
    assert experts.slot_bytes == plain_experts.slot_bytes
    assert experts.expert_bytes < 0.7 * plain_experts.expert_bytes  # what is read stays small
    assert rows["transfer buffers"] > plain_rows["transfer buffers"]


@pytest.mark.usefixtures("bands")
def test_reading_an_expert_keeps_to_its_bytes(form: tuple[Path, Any]) -> None:
    folder, _ = form
    experts = tiny_quantized.read(folder).experts
    source = CheckpointSlice(experts)
    reader, slot = source.open(), tiny.aligned(experts.slot_bytes)
    scratch = max(layer.scratch_bytes for layer in experts.layers)
    with tiny.PeakBytes([slot]) as memory:
        for layer in experts.layers:
            reader.read(ExpertKey(layer.index, 1), slot)
    reader.close()
    # A few numbers of a scale weigh something in matrices this small.
    assert memory.peak <= source.reader_bytes - bounce_bytes(experts) - scratch + 4096


def test_converted_experts_are_those_of_the_numbers(form: tuple[Path, Any], tmp_path: Path) -> None:
    folder, config = form
    plain = tiny_quantized.save_plain(tmp_path / "plain", tiny_quantized.resident(folder, config))
    for name, model in (("quantised", folder), ("plain again", plain)):
        convert_model(model, PlanOptions(experts="nf4,int8", expert_store=tmp_path / name))
    records = sorted(path.name for path in (tmp_path / "quantised").glob("*.experts"))
    assert [record.split(".")[0].split("-")[0] for record in records] == ["int8", "nf4"]
    for record in records:
        assert (tmp_path / "quantised" / record).read_bytes() == (tmp_path / "plain again" / record).read_bytes()
    prompt = tiny.ids(1, 8)
    logits = []
    for model, store in ((folder, "quantised"), (plain, "plain again")):
        with tiny.open_model(model, experts="nf4", expert_store=tmp_path / store) as opened:
            logits.append(opened(prompt).logits)
    assert tiny.same_bits(*logits)


def test_blocks_that_are_cut_off_at_the_edge(tmp_path: Path) -> None:
    """As in DeepSeek-V3, whose 576 rows have blocks of 128: transformers refuses, or takes blocks to be smaller."""
    block = (16, 48)
    tiny.save(tmp_path, "deepseek_v3", torch.bfloat16)
    expected: dict[str, torch.Tensor] = {}

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(filter(tiny_quantized.is_linear, tensors)):
            tensors[key], tensors[f"{key}_scale_inv"] = tiny_quantized.blocks(tensors[key], block)
            expected[key] = tiny_quantized.numbers(tensors[key], tensors[f"{key}_scale_inv"], block)

    tiny.edit_tensors(tmp_path, quantise)
    tiny_quantized.say(tmp_path, quant_method="fp8", weight_block_size=block)
    checkpoint = tiny_quantized.read(tmp_path)
    model = tiny_quantized.load(tmp_path, checkpoint)
    dense = {key for key in expected if ".experts." not in key}
    assert [key for key in dense if not tiny.same_bits(model.get_parameter(key).detach(), expected[key])] == []
    reader, slot = CheckpointSlice(checkpoint.experts).open(), tiny.aligned(checkpoint.experts.slot_bytes)
    layer = checkpoint.experts.layers[0]
    reader.read(ExpertKey(0, 5), slot)
    down = f"{layer.path}.5.down_proj.weight"
    assert tiny.same_bits(layer.views(slot)["down_proj"], expected[down])
    reader.close()


def test_experts_that_were_left_alone_are_read_into_place(tmp_path: Path) -> None:
    """Some checkpoints keep a layer as it was."""
    tiny_quantized.save_fp8(tmp_path, "qwen3_moe")

    def restore(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if ".layers.0." in key and key.endswith("_scale_inv")]:
            tensors.pop(key)
            weight = key.removesuffix("_scale_inv")
            tensors[weight] = tensors[weight].to(torch.bfloat16)

    tiny.edit_tensors(tmp_path, restore)
    checkpoint = tiny_quantized.read(tmp_path)
    layers = checkpoint.experts.layers
    assert layers[0].converted == () and layers[1].converted == layers[1].parameters
    expected = tiny_quantized.resident(tmp_path, FP8)
    assert tiny_quantized.wrong_experts(checkpoint, expected) == []
    assert tiny_quantized.wrong_dense(tiny_quantized.load(tmp_path, checkpoint), checkpoint, expected) == []


def test_scales_of_a_whole_tensor_and_of_activations(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_moe", torch.bfloat16)

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(filter(tiny_quantized.is_linear, tensors)):
            scale = tensors[key].abs().max().float() / tiny_quantized.LARGEST_FP8
            tensors[key] = (tensors[key].float() / scale).to(torch.float8_e4m3fn)
            tensors[f"{key}_scale_inv"] = scale
            tensors[key.replace(".weight", ".activation_scale")] = torch.tensor(0.5)

    tiny.edit_tensors(tmp_path, quantise)
    tiny_quantized.say(tmp_path, quant_method="fp8", weight_block_size=None, activation_scheme="static")
    checkpoint, expected = tiny_quantized.read(tmp_path), tiny_quantized.resident(tmp_path, FP8)
    assert tiny_quantized.wrong_experts(checkpoint, expected) == []
    assert tiny_quantized.wrong_dense(tiny_quantized.load(tmp_path, checkpoint), checkpoint, expected) == []


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dense_weights_of_bitsandbytes(kind: str, nested: bool, tmp_path: Path) -> None:
    """transformers leaves experts alone, which are no linear layers, and quantises the rest."""
    plain = tiny.save(tmp_path / "plain", "qwen3_moe", torch.bfloat16)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    family = families()["qwen3_moe"]
    model = family.model_class.from_pretrained(plain, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(tmp_path / "quantised")
    expected = family.model_class.from_pretrained(tmp_path / "quantised", dtype=torch.bfloat16)
    expected = expected.dequantize(torch.bfloat16)

    checkpoint = tiny_quantized.read(tmp_path / "quantised")
    assert tiny_quantized.wrong_experts(checkpoint, expected) == []
    loaded = tiny_quantized.load(tmp_path / "quantised", checkpoint)
    theirs = dict(expected.named_parameters())
    ours = dict(loaded.named_parameters())
    assert [key for key in ours if not tiny.same_bits(ours[key].detach(), theirs[key].detach())] == []
    packed = [name for name in checkpoint.experts.packed if "q_proj" in name]
    assert len(packed) == 3
    with tiny.open_model(tmp_path / "quantised") as offloaded:
        assert offloaded(tiny.ids(1, 6)).logits.isfinite().all()
