"""Options in Python: what they are called, what they were called, and what contradicts itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.errors import OffloadError
from offload.options import Keywords, LoadOptions, ModelOptions, PlanOptions, SamplingOptions, load_options


@pytest.mark.parametrize("kind", [ModelOptions, PlanOptions, LoadOptions, Keywords])
def test_every_option_is_explained_where_it_is_stated(kind: type[Any]) -> None:
    for name in kind.__annotations__:
        assert f"\n    {name}: " in (kind.__doc__ or "")


def test_old_keywords_are_taken_and_said() -> None:
    with pytest.warns(DeprecationWarning, match="policy_profile= is profile= now") as warned:
        assert load_options({"policy_profile": "T", "context": 8}) == LoadOptions(profile="T", context=8)
    assert Path(warned[0].filename) == Path(__file__)
    with pytest.warns(DeprecationWarning), pytest.raises(OffloadError, match="give P or T, not both"):
        load_options({"predictor_profile": "T", "profile": "P"})


def test_a_keyword_that_no_option_has_is_refused_with_what_may_be_meant() -> None:
    from offload.model import OffloadedModel

    with pytest.raises(TypeError, match=r"^from_pretrained\(\) got .* argument 'polcy': did you mean policy\?$"):
        OffloadedModel.from_pretrained("some/model", polcy="lru")
    with pytest.raises(TypeError, match=r"^from_pretrained\(\) got .* argument 'xyzzy'$"):
        load_options({"xyzzy": 1})


@pytest.mark.parametrize("value", ["8", 2.5, True, float("nan"), [8]])
@pytest.mark.parametrize("name", ["context", "prefetch_depth", "threads"])
def test_what_counts_is_a_whole_number(name: str, value: Any) -> None:
    with pytest.raises(OffloadError, match=f"--{name.replace('_', '-')} .*: write a whole number"):
        load_options({name: value})
    assert getattr(load_options({name: np.int64(8)}), name) == 8


@pytest.mark.parametrize("name", ["preset", "experts", "fallback", "dense", "policy", "predictor", "scheduler"])
def test_what_is_a_name_is_text(name: str) -> None:
    with pytest.raises(OffloadError, match=f"--{name} 4: write text"):
        load_options({name: 4})


@pytest.mark.parametrize("name", ["profile", "expert_store"])
def test_what_is_a_file_is_a_path(name: str) -> None:
    with pytest.raises(OffloadError, match=f"--{name.replace('_', '-')} 4: write a path"):
        load_options({name: 4})
    assert getattr(load_options({name: Path("a")}), name) == Path("a")


def test_a_device_may_be_torchs() -> None:
    import torch  # here, so that the quick tests start without it

    assert load_options({"device": torch.device("cuda", 1)}).device == "cuda:1"
    assert load_options({"device": None}) == LoadOptions()


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), 1e-40, 1e40, -1.0])
def test_a_temperature_that_nothing_can_be_chosen_by_is_refused(temperature: float) -> None:
    with pytest.raises(OffloadError, match=r"--temperature .*: it is 0, .* or lies between 1e-6 and 1e6"):
        SamplingOptions(temperature=temperature)
    assert [SamplingOptions(temperature=t).temperature for t in (1e-6, 1, 1e6)] == [1e-6, 1, 1e6]


@pytest.mark.parametrize("top_p", [0, float("nan"), -0.1, 1.5])
def test_a_share_that_leaves_nothing_to_choose_from_is_refused(top_p: float) -> None:
    with pytest.raises(OffloadError, match=r"--top-p .*: give a share above 0 and up to 1"):
        SamplingOptions(top_p=top_p)
    assert SamplingOptions(top_p=1).top_p == 1


def test_a_temperature_of_zero_leaves_nothing_to_choose_from() -> None:
    assert SamplingOptions(temperature=0).top_p is None
    with pytest.raises(OffloadError, match="leave one of them out"):
        SamplingOptions(temperature=0, top_p=0.9)
