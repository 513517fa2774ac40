"""One token's queries, keys and values in one call: the bits of the calls that it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ids, open_model, same_bits, save
from transformers import DynamicCache
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention
from transformers.models.mixtral.modeling_mixtral import MixtralAttention
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention
from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import (
    OpenAIPrivacyFilterAttention as PrivacyFilterAttention,
)
from transformers.models.phimoe.modeling_phimoe import PhimoeAttention
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeAttention
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

from offload.formats.cpu import native
from offload.layers import heads, loading
from offload.layers.attention_code import Known, Norms, known_attention
from offload.layers.heads import Heads

pytestmark = pytest.mark.skipif(not native.level(), reason="our kernels do not run here")

SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


def layers(model: Any) -> list[Any]:
    return [each for each in model.module.modules() if hasattr(each, "q_proj")]


def answers(model: Any) -> list[torch.Tensor]:
    """Logits of a prompt and of five tokens after it."""
    found, text = [], ids(1, 11)
    with torch.no_grad():
        output = model(text, use_cache=True)
        for _ in range(5):
            found.append(output.logits[:, -1])
            token = found[-1].argmax(-1, keepdim=True)
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
    return [*found, output.logits[:, -1]]


KINDS = [{"dense": "nf4"}, {"dense": "nf4", "activations": "int8"}, {"dense": "auto"}]
"""How the matrices of linear layers are multiplied by our kernels."""


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe"])
def test_bits_are_those_of_the_calls_it_stands_for(
    family: str, kind: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, family, **SHAPE)
    options: dict[str, Any] = {"exact": False, "dtype": "bf16"} | kind
    calls: list[int] = []
    compute = Heads.compute

    def counted(self: Heads, *args: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return compute(self, *args)

    monkeypatch.setattr(Heads, "compute", counted)
    monkeypatch.setattr(loading, "use_sublayers", lambda model: None)
    with open_model(tmp_path, **options) as model:
        assert all(layer.heads is not None for layer in layers(model))
        together = answers(model)
        assert len(calls) == 5 * len(layers(model))
        for layer in layers(model):
            layer.heads = None
        each = answers(model)
        assert len(calls) == 5 * len(layers(model))
    assert all(same_bits(a, b) for a, b in zip(together, each, strict=True))


@pytest.mark.parametrize("sinks", [-3.0, 3.0])
def test_sinks_and_windows(sinks: float, tmp_path: Path) -> None:
    """Close to transformers' own attention, which rounds its weights, over a window that slides; not without sinks."""
    save(tmp_path, "gpt_oss", **SHAPE, sliding_window=4)
    with open_model(tmp_path, exact=False, dense="nf4", dtype="bf16") as model, torch.no_grad():
        layer = layers(model)[0]
        x = torch.randn(15, 1, 1, SHAPE["hidden_size"]).bfloat16()
        turn = torch.rand(2, 15, 1, 1, SHAPE["head_dim"] // 2).bfloat16()

        def mixed(sinks: float) -> torch.Tensor:
            layer.sinks.fill_(sinks)
            cache, found = DynamicCache(config=model.config), []
            mask = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16)
            for i, each in enumerate(x):
                keys = min(i, 3) + 1 if layer.layer_type == "sliding_attention" else i + 1
                told = {"attention_mask": mask.expand(1, 1, 1, keys).contiguous(), "past_key_values": cache}
                found.append(layer(each, position_embeddings=(turn[0, i], turn[1, i]), **told)[0])
            return torch.cat(found).double()

        ours, others = mixed(sinks), mixed(-sinks)
        layer.heads = None
        theirs = mixed(sinks)
        assert (ours - theirs).norm() < 0.02 * theirs.norm()
        assert (others - theirs).norm() > 0.2 * theirs.norm()


def test_whoever_asks_for_weights_gets_them(tmp_path: Path) -> None:
    save(tmp_path, "gpt_oss", **SHAPE)
    with open_model(tmp_path, exact=False, dense="nf4", dtype="bf16") as model, torch.no_grad():
        output = model(ids(1, 11), use_cache=True)
        weights = model(ids(1, 1), past_key_values=output.past_key_values, output_attentions=True).attentions
        assert len(weights) == len(layers(model)) and all(each.shape == (1, 4, 1, 12) for each in weights)


@pytest.mark.parametrize(
    "change", [{"exact": True}, {"dense": "int8"}, {"exact": True, "dense": "auto"}, {"dtype": "fp32"}]
)
def test_other_models_compute_as_before(change: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path, "qwen3_moe", **SHAPE)
    with open_model(tmp_path, **({"exact": False, "dense": "nf4", "dtype": "bf16"} | change)) as model:
        assert not any(isinstance(layer, heads._Attention) for layer in layers(model))


def test_classes_that_are_known() -> None:
    assert known_attention(Qwen3MoeAttention) == Known(Norms.HEADS)
    plain = MixtralAttention, Qwen2MoeAttention, PhimoeAttention
    assert [known_attention(cls) for cls in plain] == [Known(Norms.NONE)] * 3
    assert known_attention(OlmoeAttention) == Known(Norms.ALL)
    assert known_attention(GptOssAttention) == Known(Norms.NONE, sinks=True)
    assert known_attention(PrivacyFilterAttention) is None


class Turned(Qwen3MoeAttention):
    """Another one, whose code says something else."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_class_made_from_a_known_one_is_not() -> None:
    assert known_attention(Turned) is None
