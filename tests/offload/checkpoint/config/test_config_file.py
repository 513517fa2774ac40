"""A config.json that cannot be used is one line that says why, with the field to blame where one is known."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from cache.errors import CheckpointError, ModelError, OffloadError, UnsupportedFamilyError
from offload.checkpoint.config import blame
from offload.checkpoint.config.blame import culprits
from offload.checkpoint.config.file import ConfigFile
from offload.options import PlanOptions
from offload.plan.prepare import make_plan

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("sound"), "qwen3_moe")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A checkpoint whose files may be replaced."""
    for file in sound.iterdir():
        os.link(file, tmp_path / file.name)
    return tmp_path


def write(path: Path, content: str | bytes) -> None:
    path.unlink()
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def edit(folder: Path, *gone: str, **values: Any) -> Path:
    fields = json.loads((folder / "config.json").read_text()) | values
    write(folder / "config.json", json.dumps({name: value for name, value in fields.items() if name not in gone}))
    return folder


def planned(folder: Path) -> object:
    return make_plan(folder, PlanOptions(cpu_mem="8G", device="cpu", context=64))


REFUSED: dict[str, tuple[Any, str]] = {
    "head_dim": (0, "head_dim is 0 (ZeroDivisionError: "),
    "hidden_size": (2**40, "hidden_size is 1099511627776 (RuntimeError: Storage size calculation overflowed"),
    "num_attention_heads": (-1, "num_attention_heads is -1 (RuntimeError: Trying to create tensor with negative"),
    "hidden_act": ("x", "hidden_act is \"x\" (KeyError: 'x')"),
    "dtype": ("auto", "dtype is \"auto\" (AttributeError: module 'torch' has no attribute 'auto')"),
    "torch_dtype": ("torch.bfloat16", "dtype is \"torch.bfloat16\" (AttributeError: module 'torch' has no"),
    "num_experts_per_tok": (9, "num_experts_per_tok is 9 or num_local_experts is 8 (RuntimeError: "),
    "decoder_sparse_step": (0, "decoder_sparse_step is 0 (ZeroDivisionError: "),
    "id2label": (5, "id2label is 5 (AttributeError: "),
    "quantization_config": (5, "quantization_config is 5 (AttributeError: "),
    "pad_token_id": (10**6, "pad_token_id is 1000000 (AssertionError: Padding_idx must be within num_embeddings)"),
    "rope_scaling": ({"type": "x", "factor": 2}, "rope_scaling.type is \"x\" (KeyError: 'x')"),
    "_attn_implementation": ("flash_attention_2", '_attn_implementation is "flash_attention_2" (ImportError: Flash'),
    "_experts_implementation": ("x", '_experts_implementation is "x" (ValueError: transformers knows no experts'),
    "num_hidden_layers": (10**9, "num_hidden_layers is 1000000000, and no model has more than 1000 layers"),
    "rope_parameters": ({"num_layers": 10**9}, "rope_parameters.num_layers is 1000000000, and no model has more than"),
    "num_labels": (10**9, "num_labels is 1000000000, and no model has more than 100000 labels"),
}


SMALL = [
    ("deepseek_v3", {"n_group": 0}, "n_group is 0 (ZeroDivisionError"),
    ("deepseek_v3", {"topk_group": 9}, "topk_group is 9 (RuntimeError"),
    ("deepseek_v3", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
    ("qwen3_moe", {"num_experts_per_tok": -1}, "num_experts_per_tok is -1"),
    ("qwen3_moe", {"num_experts_per_tok": 50}, "num_experts_per_tok is 50 or num_local_experts is 4 (RuntimeError"),
]
"""Wrong fields of models so small that the family's defaults would fit them as little."""


@pytest.mark.parametrize(("family", "wrong", "said"), SMALL)
def test_the_field_is_named_where_no_default_would_fit(
    family: str, wrong: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blame, "_PATIENCE_S", 60)
    groups = {
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    }
    tiny.save(tmp_path, family, num_hidden_layers=2, **(groups if family == "deepseek_v3" else {"num_experts": 4}))
    planned(tmp_path)
    with pytest.raises(CheckpointError) as refused:
        planned(edit(tmp_path, **wrong))
    assert f": its config.json cannot be used: {said}" in str(refused.value)


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_cannot_be_used_is_named(field: str, folder: Path) -> None:
    value, said = REFUSED[field]
    gone = "dtype" if field == "torch_dtype" else ""
    with pytest.raises(CheckpointError) as refused:
        planned(edit(folder, gone, **{field: value}))
    message = str(refused.value)
    assert message.startswith(f"{folder}: its config.json cannot be used: ") and "\n" not in message
    assert said in message


def test_attention_that_only_a_gpu_computes_rightly_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match='_attn_implementation is "flex_attention", which is made for GPUs'):
        planned(edit(folder, _attn_implementation="flex_attention"))


@pytest.mark.parametrize("dtype", [5, 0, "int8", "float8_e4m3fn"])
def test_a_dtype_to_compute_nothing_in_is_refused_and_another_may_be_asked_for(dtype: Any, folder: Path) -> None:
    edit(folder, dtype=dtype)
    with pytest.raises(CheckpointError, match=r"dtype is .*: pass --dtype bfloat16, float16 or float32"):
        planned(folder)
    assert make_plan(folder, PlanOptions(cpu_mem="8G", device="cpu", context=64, dtype="bf16")).dtype == "bfloat16"


def test_no_expert_and_encoders_are_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="num_experts_per_tok is 0"):
        planned(edit(folder, num_experts_per_tok=0))
    with pytest.raises(UnsupportedFamilyError, match="as is_encoder_decoder in"):
        planned(edit(folder, num_experts_per_tok=3, is_encoder_decoder=True))


def test_a_quantisation_without_a_method_is_refused(folder: Path) -> None:
    with pytest.raises(UnsupportedFamilyError, match=r"quantised format that is not read \(unknown\)"):
        planned(edit(folder, quantization_config={}))


def test_minus_one_position_is_no_limit(folder: Path) -> None:
    with tiny.open_model(edit(folder, max_position_embeddings=-1)) as model:
        found = model(tiny.ids(1, 8)).logits
    assert tiny.same_bits(found, tiny.resident(folder)(tiny.ids(1, 8)).logits)


def test_building_has_an_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.checkpoint.building._MOST_STEPS", 50)
    with pytest.raises(CheckpointError, match="building it takes more than 50 steps"):
        planned(folder)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path may have 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize(("make", "kind"), [(_pipe, "pipe"), (_device, "device"), (_socket, "socket")])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]
)
def test_what_is_no_file_is_refused(make: Callable[[Path], None], kind: str, name: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(OffloadError, match=f"{name} is a {kind}, not a file"):
        planned(folder)


def test_what_nothing_reads_may_be_anything_and_a_link_to_nowhere_is_nothing(folder: Path) -> None:
    _pipe(folder / "log")
    (folder / "chat_template.jinja").symlink_to(folder / "nowhere")
    planned(folder)


class Grumbling:
    """Takes fields as long as `bad` is not among them."""

    def __init__(self, *bad: str) -> None:
        self.bad = bad
        self.tries = 0

    def __call__(self, fields: Any) -> None:
        self.tries += 1
        inner = fields.get("inner", {})
        if all(name in fields or name in inner for name in self.bad):
            raise ValueError


FIELDS = {"model_type": "m", "a": 1, "b": 0, "inner": {"c": 2, "d": [1]}}


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (["a"], [("a", 1)]),
        (["c"], [("inner.c", 2)]),
        (["a", "b"], [("b", 0), ("a", 1)]),
        (["a", "b", "c"], []),  # any one of three: nobody knows
        (["model_type"], []),
        (["nothing"], []),  # takes it as it is
    ],
)
def test_the_culprit_is_the_field_without_which_it_works(bad: list[str], found: list[tuple[str, Any]]) -> None:
    assert culprits(FIELDS, {}, Grumbling(*bad)) == found


def test_what_is_as_everywhere_is_not_to_blame() -> None:
    attempt = Grumbling("a", "b")
    assert culprits(FIELDS, {"b": 0, "inner": {"c": 2}}, attempt) == [("a", 1)]
    assert attempt.tries == 3  # all of them, without a, without inner.d


def test_looking_for_a_culprit_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blame, "_PATIENCE_S", -1)
    attempt = Grumbling("a")
    assert culprits(FIELDS, {}, attempt) == [] and attempt.tries == 1


def test_errors_of_ours_of_the_disk_and_of_memory_stay_what_they_are() -> None:
    file = ConfigFile("m", {"model_type": "qwen3_moe"})
    for error in (ModelError("x"), OSError(5, "the disk"), MemoryError(), torch.OutOfMemoryError("x")):
        with pytest.raises(type(error)), file.blamed():
            raise error
    with (
        pytest.raises(CheckpointError, match=r"^m: its config.json cannot be used \(OSError: no number\)$"),
        file.blamed(),
    ):
        raise OSError("no number")
    with pytest.raises(CheckpointError, match=r"\(ValueError: x y\)$"), file.blamed():
        raise ValueError("x\n\ty")
