"""While a model is loaded, other threads load and run plain transformers models as if nothing were going on."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import PreTrainedModel
from transformers.initialization import no_tie_weights
from transformers.modeling_utils import local_torch_dtype
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.utils import logging

from offload.store.files import FileReader

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)

POINTS = {
    "while modules are built": (Qwen3MoeExperts, "__init__"),
    "while weights are read": (FileReader, "read"),
    "while buffers are computed": (PreTrainedModel, "_initialize_weights"),
}


def beside(monkeypatch: pytest.MonkeyPatch, point: tuple[type, str], action: Callable[[], Any]) -> list[Any]:
    """At the first call of a method, in whatever thread, another thread runs `action` before it goes on; what that
    gave. Calls within `action` are left alone."""
    cls, name = point
    original, results, busy = getattr(cls, name), [], threading.Lock()

    def paused(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not results and busy.acquire(blocking=False):
            with ThreadPoolExecutor(1) as other:
                results.append(other.submit(action).result())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(cls, name, paused)
    return results


def shared_by_all_threads() -> dict[str, Any]:
    """What loading might change of the process."""
    inits = {name: getattr(torch.nn.init, name) for name in ("normal_", "kaiming_uniform_", "zeros_", "trunc_normal_")}
    return inits | {
        "default dtype": torch.get_default_dtype(),
        "linspace": torch.linspace,
        "tie_weights": PreTrainedModel.tie_weights,
        "init_weights": PreTrainedModel.init_weights,
        "verbosity": logging.get_verbosity(),
        "progress bars": logging.is_progress_bar_enabled(),
        "warnings": list(warnings.filters),
        "gradients": torch.is_grad_enabled(),
        "a new tensor": (torch.empty(1).dtype, torch.empty(1).device),
    }


@pytest.mark.parametrize("point", POINTS)
def test_a_plain_model_loaded_meanwhile_is_as_ever(point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save(tmp_path, "qwen3_moe", torch.bfloat16)
    inputs = tiny.ids(1, 6)

    def resident() -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = tiny.resident(tmp_path, torch.bfloat16)(inputs).logits
        return logits

    expected = resident()
    found = beside(monkeypatch, POINTS[point], resident)
    with tiny.open_model(tmp_path) as model:
        assert len(found) == 1
        assert tiny.same_bits(found[0], expected)
        assert tiny.same_bits(model(inputs).logits, expected)
    assert tiny.same_bits(resident(), expected)


@pytest.mark.parametrize("point", POINTS)
def test_nothing_of_the_process_is_changed_meanwhile(
    point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save(tmp_path, "qwen3_moe", torch.bfloat16)
    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    before = shared_by_all_threads()
    found = beside(monkeypatch, POINTS[point], shared_by_all_threads)
    try:
        with tiny.open_model(tmp_path):
            assert found == [before]
        assert shared_by_all_threads() == before
    finally:
        logging.set_verbosity_error()
        logging.disable_progress_bar()


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_what_transformers_changes_for_all_threads_meanwhile_makes_no_difference(
    tie_word_embeddings: bool, tmp_path: Path
) -> None:
    """As it does while another thread builds a model: torch's default type, and no ties."""
    tiny.save(tmp_path, "qwen3_moe", torch.bfloat16, tie_word_embeddings=tie_word_embeddings)
    with torch.no_grad():
        expected = tiny.resident(tmp_path, torch.bfloat16)(tiny.ids(1, 6)).logits
    with no_tie_weights(), local_torch_dtype(torch.float16):
        model = tiny.open_model(tmp_path)
    with model:
        assert model.plan.items[:3] == alone(tmp_path)
        assert tiny.same_bits(model(tiny.ids(1, 6)).logits, expected)


def alone(folder: Path) -> Any:
    """What dense weights, KV cache and workspace take of a model that is loaded alone."""
    with tiny.open_model(folder) as model:
        return model.plan.items[:3]


def test_several_of_ours_may_be_loaded_at_once(tmp_path: Path) -> None:
    wanted = {"qwen3_moe": torch.bfloat16, "gpt_oss": torch.float32, "deepseek_v3": torch.float16}
    expected = {}
    for name, dtype in wanted.items():
        tiny.save(tmp_path / name, name, dtype)
        with torch.no_grad():
            expected[name] = tiny.resident(tmp_path / name, dtype)(tiny.ids(1, 6)).logits
    with ThreadPoolExecutor(len(wanted)) as threads:
        models = dict(zip(wanted, threads.map(lambda name: tiny.open_model(tmp_path / name), wanted), strict=True))
    torch.set_num_threads(1)
    for name, model in models.items():
        with model:
            assert tiny.same_bits(model(tiny.ids(1, 6)).logits, expected[name]), name
