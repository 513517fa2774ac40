"""An adapter is named as what it is, alone or beside a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from cache.errors import CheckpointError, UnknownModelError
from offload.options import PlanOptions
from offload.plan.prepare import make_plan

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)

OPTIONS = PlanOptions(cpu_mem="8G", device="cpu")


def add_adapter(folder: Path, base: object = "Qwen/Qwen3-30B-A3B") -> None:
    """As PEFT saves one."""
    weights = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(8, 64)}
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))


def test_a_folder_with_an_adapter_alone(tmp_path: Path) -> None:
    add_adapter(tmp_path)
    with pytest.raises(UnknownModelError, match=r"holds an adapter alone.*its base model \(Qwen/Qwen3-30B-A3B\)"):
        make_plan(tmp_path, OPTIONS)


@pytest.mark.parametrize("base", [None, 5, ["x"]])
def test_an_adapter_that_names_no_base(base: object, tmp_path: Path) -> None:
    add_adapter(tmp_path, base)
    with pytest.raises(UnknownModelError, match="holds an adapter alone and no model: load its base model or"):
        make_plan(tmp_path, OPTIONS)


@pytest.mark.parametrize("content", ["", "[]", "[" * 10**5, '{"base_model_name_or_path": '])
def test_an_adapter_whose_configuration_cannot_be_read(content: str, tmp_path: Path) -> None:
    add_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(UnknownModelError, match="holds an adapter alone and no model: load its base model or"):
        make_plan(tmp_path, OPTIONS)


def test_an_adapter_with_the_configuration_of_its_base(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_moe")
    (tmp_path / "model.safetensors").unlink()
    add_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="holds an adapter alone and no model"):
        make_plan(tmp_path, OPTIONS)


def test_an_adapter_beside_a_model_is_said_not_to_be_used(tmp_path: Path) -> None:
    add_adapter(tiny.save(tmp_path, "qwen3_moe"))
    (note,) = make_plan(tmp_path, OPTIONS).notes
    assert "the adapter beside the weights (adapter_config.json) is not used" in note
