"""An offloaded model is asked what a transformers model is asked: it answers alike, or says why it cannot."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_chat
import torch
from transformers import GenerationConfig, PreTrainedModel, pipeline

from offload.model import OffloadedModel

IDS = tiny.ids(1, 5)

# Questions.


def test_it_answers_as_the_resident_model(model: OffloadedModel, resident: Any, checkpoint: Path) -> None:
    for name in ("main_input_name", "input_modalities", "output_modalities", "training", "dtype", "device"):
        assert getattr(model, name) == getattr(resident, name), name
    assert model.can_generate() is resident.can_generate() is True
    assert model.name_or_path == str(checkpoint)
    for arguments in ((), (True,), (False, True)):
        assert model.num_parameters(*arguments) == resident.num_parameters(*arguments)
    vectors, logits = model.get_input_embeddings()(IDS), model.get_output_embeddings()
    assert tiny.same_bits(vectors, resident.get_input_embeddings()(IDS))
    assert tiny.same_bits(logits(vectors), resident.get_output_embeddings()(vectors))
    prepared = model.prepare_inputs_for_generation(IDS, attention_mask=torch.ones_like(IDS))
    assert torch.equal(prepared["input_ids"], IDS)


def test_transition_scores_are_the_resident_models(model: OffloadedModel, resident: Any) -> None:
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True}
    for beams in ({"do_sample": False}, {"num_beams": 2, "do_sample": False}):
        scores = []
        for each in (model, resident):
            said = each.generate(IDS, **arguments, **beams)
            indices = said.beam_indices if "num_beams" in beams else None
            scores.append(each.compute_transition_scores(said.sequences, said.scores, indices, normalize_logits=True))
        assert tiny.same_bits(*scores)


def test_its_parameters_are_those_that_are_resident(model: OffloadedModel, resident: Any) -> None:
    resident_ones = dict(resident.named_parameters())
    names = {name for name, _ in model.named_parameters()}
    assert "lm_head.weight" in names and not any("experts" in name for name in names)
    for name, parameter in model.named_parameters():
        if parameter.numel():
            assert tiny.same_bits(parameter.data, resident_ones[name].data)
    assert [id(each) for each in model.parameters()] == [id(each) for _, each in model.named_parameters()]
    assert next(model.parameters()).device == model.device


def test_experts_are_said_to_be_on_disk(model: OffloadedModel) -> None:
    assert model.hf_device_map[""] == model.device
    assert [path for path, where in model.hf_device_map.items() if where == "disk"] == [
        f"model.layers.{i}.mlp.experts" for i in range(model.plan.layers)
    ]


def test_what_changes_nothing_gives_the_model_back(model: OffloadedModel) -> None:
    assert model.eval() is model.train(False) is model.requires_grad_(False) is model
    assert model.to("cpu") is model.to(model.device) is model.to(torch.float32) is model.to(IDS.float()) is model
    assert model.to(device="cpu", dtype=torch.float32) is model.cpu() is model.float() is model
    model.tie_weights()


def test_the_generation_defaults_can_be_replaced(model: OffloadedModel, resident: Any) -> None:
    model.generation_config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert model.generation_config.max_new_tokens == 3
    assert torch.equal(model.generate(IDS), resident.generate(IDS, max_new_tokens=3, do_sample=False))


def test_what_it_is_in_one_line(checkpoint: Path) -> None:
    with tiny.open_model(checkpoint, cpu_mem="3G") as model:
        said = f"OffloadedModel('{checkpoint}', device='cpu', dtype='float32', experts='fp32', cpu_mem='3.00 GiB'"
        assert repr(model) == f"{said})"
    assert repr(model) == f"{said}, closed)"
    with tiny.open_model(checkpoint, device="emulated", gpu_mem="2G") as model:
        assert "device='emulated'" in repr(model) and "gpu_mem='2.00 GiB'" in repr(model)


def test_a_pipeline_has_no_complaint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows the class, and moves nothing."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tiny_chat.save_checkpoint(tmp_path)
    with tiny.open_model(tmp_path) as model:
        generator = pipeline("text-generation", model=model, tokenizer=model.tokenizer)
        assert "OffloadedModel" in repr(generator) and generator.device == model.device
        assert generator("Hello", max_new_tokens=3)[0]["generated_text"].startswith("Hello")
    assert not caplog.records


# Refusals.


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda model: model.to("meta"), r"\.to: it computes on cpu in torch.float32.* `device`"),
        (lambda model: model.to(torch.bfloat16), "`dtype`"),
        (lambda model: model.half(), "`dtype`"),
        (lambda model: model.bfloat16(), "`dtype`"),
        (lambda model: model.double(), "`dtype`"),
        (lambda model: model.to_empty(device="cpu"), "open the model again"),
        (lambda model: model.train(), "without gradients"),
        (lambda model: model.requires_grad_(), "without gradients"),
        (lambda model: model.gradient_checkpointing_enable(), "without gradients"),
        (lambda model: model.state_dict(), "in no state dict"),
        (lambda model: model.save_pretrained("somewhere"), r"\.save_pretrained: .* in no state dict"),
        (lambda model: model.add_adapter(None), "PEFT"),
        (lambda model: model.modules(), "PEFT.*model.module.named_modules"),  # what PEFT asks first
        (lambda model: model.resize_token_embeddings(300), "change the checkpoint"),
    ],
)
def test_what_cannot_be_says_why(model: OffloadedModel, call: Callable[[Any], object], why: str) -> None:
    with pytest.raises(NotImplementedError, match=why) as refusal:
        call(model)
    assert "\n" not in str(refusal.value)


def test_no_checkpoint_is_written_that_lacks_the_experts(model: OffloadedModel, tmp_path: Path) -> None:
    for each in (model, model.module):
        with pytest.raises(NotImplementedError, match="in no state dict"):
            each.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_public_name_of_a_transformers_model_is_known(model: OffloadedModel) -> None:
    """It is there, refused, or found in the model inside."""
    for name in (name for name in dir(PreTrainedModel) if not name.startswith("_")):
        try:
            getattr(model, name)
        except AttributeError as error:
            assert str(error).endswith(f"model.module.{name}")


def test_a_name_that_nobody_has(model: OffloadedModel) -> None:
    with pytest.raises(AttributeError, match=r"^'OffloadedModel' object has no attribute 'nonsense'$"):
        _ = model.nonsense  # type: ignore[attr-defined]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_it_is_not_copied(model: OffloadedModel, copied: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError, match=r"an OffloadedModel cannot be copied or pickled: .* open another"):
        copied(model)


def test_nor_is_the_model_inside(model: OffloadedModel) -> None:
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            copied(model.module)


# What is no prompt.


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"input_ids": IDS.tolist()},
        {"input_ids": IDS[0].tolist()},
        {"input_ids": IDS[0]},
        {"input_ids": IDS[0, 0]},
        {"input_ids": IDS[None]},
        {"input_ids": IDS[:, :0]},
        {"input_ids": IDS.float()},
        {"input_ids": "Hello"},
        {"inputs_embeds": torch.zeros(3, 64)},
        {"input_ids": IDS, "inputs_embeds": torch.zeros(1, 5, 64)},
        {"input_ids": IDS, "past_key_values": []},
    ],
)
def test_what_is_no_prompt_is_the_resident_models_error(
    model: OffloadedModel, resident: Any, arguments: dict[str, Any]
) -> None:
    with pytest.raises(Exception) as expected, torch.no_grad():
        resident(**arguments)
    with pytest.raises(type(expected.value)) as error:
        model(**arguments)
    assert str(error.value) == str(expected.value)
    assert tiny.same_bits(model(IDS).logits, resident(IDS).logits.detach())


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model(IDS, input_ids=IDS),
        lambda model: model(IDS, *[None] * 11),
        lambda model: model(IDS, foo=3, return_dict=False)[0],
    ],
)
def test_arguments_that_nobody_takes(model: OffloadedModel, resident: Any, call: Callable[[Any], Any]) -> None:
    found = []
    for each in (resident, model):
        try:
            with torch.no_grad():
                found.append(call(each).tolist())
        except TypeError as error:
            found.append(str(error))
    assert found[0] == found[1]


def test_arguments_by_position_count_as_by_name(model: OffloadedModel, resident: Any) -> None:
    embeds = resident.get_input_embeddings()(IDS).detach()
    with torch.no_grad():
        expected = resident(inputs_embeds=embeds).logits
    assert tiny.same_bits(model(None, None, None, None, embeds).logits, expected)
    cache = model(IDS, use_cache=True).past_key_values
    model(IDS[:, :1], None, None, cache)
    stats = model.stats.as_dict()
    assert (stats["prefill_tokens"], stats["decode_tokens"]) == (10, 1)


# What a pass tells beside logits.


def test_attentions_are_the_resident_models(checkpoint: Path) -> None:
    """By default there are none, with a warning; eager attention has them."""
    resident = tiny.resident(checkpoint)
    with tiny.open_model(checkpoint) as model:
        for attention, count in (("sdpa", 0), ("eager", 3)):
            resident.set_attn_implementation(attention)
            model.module.set_attn_implementation(attention)
            with torch.no_grad():
                expected = resident(IDS, output_attentions=True, output_router_logits=True)
            answer = model(IDS, output_attentions=True, output_router_logits=True)
            assert len(answer.attentions) == len(expected.attentions) == count
            assert all(map(tiny.same_bits, answer.attentions, expected.attentions))
            assert all(map(tiny.same_bits, answer.router_logits, expected.router_logits))
            assert tiny.same_bits(answer.aux_loss, expected.aux_loss)
