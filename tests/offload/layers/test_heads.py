"""One token's queries, keys and values in one call: the bits of the calls that it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ids, open_model, same_bits, save
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention
from transformers.models.mixtral.modeling_mixtral import MixtralAttention
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention
from transformers.models.phimoe.modeling_phimoe import PhimoeAttention
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeAttention
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

from offload.formats.cpu import native
from offload.layers import heads, loading
from offload.layers.heads import Heads, Norms

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


@pytest.mark.parametrize("activations", ["auto", "int8"])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe"])
def test_bits_are_those_of_the_calls_it_stands_for(
    family: str, activations: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, family, **SHAPE)
    options: dict[str, Any] = {"exact": False, "dense": "nf4", "dtype": "bf16", "activations": activations}
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


@pytest.mark.parametrize("change", [{"exact": True}, {"dense": "int8"}, {"dense": "auto"}])
def test_other_models_compute_as_before(change: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path, "qwen3_moe", **SHAPE)
    with open_model(tmp_path, **({"exact": False, "dense": "nf4", "dtype": "bf16"} | change)) as model:
        assert not any(isinstance(layer, heads._Attention) for layer in layers(model))


def test_classes_that_are_known() -> None:
    assert heads.norms_of(Qwen3MoeAttention) is Norms.HEADS
    plain = MixtralAttention, Qwen2MoeAttention, PhimoeAttention
    assert [heads.norms_of(cls) for cls in plain] == [Norms.NONE] * 3
    assert heads.norms_of(OlmoeAttention) is Norms.ALL
    assert heads.norms_of(GptOssAttention) is None


class Turned(Qwen3MoeAttention):
    """Another one, whose code says something else."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_class_made_from_a_known_one_is_not() -> None:
    assert heads.norms_of(Turned) is None
