"""Names that training, compiling or merging left around a model's own are read without what was around them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from cache.errors import CheckpointError
from offload.checkpoint.shards import ShardIndex, TensorInfo
from offload.checkpoint.wrappers import unwrap
from offload.options import PlanOptions
from offload.plan.prepare import make_plan

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)


def rename(folder: Path, old: str, new: str) -> None:
    """Every tensor whose name begins with `old` begins with `new`."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[new + name.removeprefix(old)] = tensors.pop(name)

    tiny.edit_tensors(folder, edit)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", "module."),
        ("", "_orig_mod."),
        ("", "base_model.model."),
        ("", "module._orig_mod."),
        ("", "_orig_mod.module."),
        ("model.layers.1.", "model.layers.1._orig_mod."),
        ("model.layers.", "module.model.layers."),
    ],
)
def test_answers_are_those_of_the_plain_names(name: str, old: str, new: str, tmp_path: Path) -> None:
    inputs = tiny.ids(1, 6)
    tiny.save(tmp_path, name)
    with torch.no_grad():
        expected = tiny.resident(tmp_path)(inputs).logits
    rename(tmp_path, old, new)
    with pytest.warns(UserWarning, match=f'tensors are named as if wrapped, such as "{new}.*read as'):
        model = tiny.open_model(tmp_path)
    with model:
        assert tiny.same_bits(model(inputs).logits, expected)
        assert set(model.parts.experts.files) == {str(tmp_path / "model.safetensors")}  # a change would be noticed


def test_two_tensors_that_would_have_one_name_keep_theirs(tmp_path: Path) -> None:
    """A wrapped copy beside the plain one is not the model's."""

    def double(tensors: dict[str, torch.Tensor]) -> None:
        tensors["module.model.norm.weight"] = tensors["model.norm.weight"] + 1

    tiny.edit_tensors(tiny.save(tmp_path, "qwen3_moe"), double)
    (note,) = make_plan(tmp_path, PlanOptions(cpu_mem="8G", device="cpu")).notes
    assert "not used: module.model.norm.weight" in note


def test_a_model_whose_own_parts_are_called_so_is_left_alone() -> None:
    info = TensorInfo("model.safetensors", "module.weight", "F32", (1,), 8, 4)
    shards = ShardIndex({"module.weight": info}, {"model.safetensors": 12})
    assert unwrap(shards, ["module.weight"]) == (shards, None)
    assert list(unwrap(shards, ["weight"])[0]) == ["weight"]


def test_other_prefixes_are_refused(tmp_path: Path) -> None:
    rename(tiny.save(tmp_path, "qwen3_moe"), "", "student.")
    with pytest.raises(CheckpointError, match="holds no tensor for model"):
        make_plan(tmp_path, PlanOptions(cpu_mem="8G", device="cpu"))
