"""Models that cannot be offloaded are refused by name, and the reason is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import families
from transformers import LlamaConfig, LlamaForCausalLM

from cache.errors import NotMoEError, UnsupportedFamilyError
from offload.model import OffloadedModel


@pytest.mark.parametrize("name", ["dbrx", "doge", "jetmoe", "switch_transformers"])
def test_another_design_is_refused_by_name_with_the_reason(name: str, tmp_path: Path, record_property: Any) -> None:
    families()[name].save(tmp_path, torch.bfloat16)
    with pytest.raises(UnsupportedFamilyError) as refusal:
        OffloadedModel.from_pretrained(tmp_path, cpu_mem="8G", device="cpu")
    message = str(refusal.value)
    assert name in message and "\n" not in message and len(message) > len(name) + 40
    record_property("refused", f"{name}: {message}")


def test_dense_model_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(NotMoEError, match=r"llama.*dense"):
        OffloadedModel.from_pretrained(tmp_path, cpu_mem="8G", device="cpu")


def test_moe_family_configured_without_experts_is_refused(tmp_path: Path) -> None:
    families()["qwen3_moe"].save(tmp_path, torch.float32, mlp_only_layers=[0, 1, 2])
    with pytest.raises(NotMoEError, match="qwen3_moe"):
        OffloadedModel.from_pretrained(tmp_path, cpu_mem="8G", device="cpu")
