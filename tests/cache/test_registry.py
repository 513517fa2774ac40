"""Naming a policy: the built-in ones, one from a user's own file, and every way to name none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from cache.errors import OffloadError, PolicyError
from cache.lanes import Lanes
from cache.policies.lru import LRU
from cache.policy import EvictionPolicy, find_policy, make_policy, names
from cache.registry import Part, Registry

LANES = Lanes.shared(2, 4)

SOURCE = """
from dataclasses import dataclass

from cache.policy import EvictionPolicy


class Newest(EvictionPolicy):
    @dataclass(frozen=True)
    class Params:
        weight: float = 1.0

        def __post_init__(self):
            if self.weight < 0:
                raise ValueError("weight is below zero")

    def priorities(self, lanes):
        return -self.params.weight * self.recency[lanes]


class Unfinished(EvictionPolicy):
    pass


not_a_policy = 3
"""


@pytest.fixture
def in_user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A working directory with the user's own module, which is named; no trace of it is left behind."""
    name = f"policies_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    (tmp_path / f"{name}_broken.py").write_text("1 / 0")
    (tmp_path / f"{name}_wordy.py").write_text("raise OSError('two\\nlines')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    yield name
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]


def test_built_in_policies_are_known_by_name() -> None:
    assert {"lru", "lfu", "lfru"} <= set(names())
    assert list(names()) == sorted(names())
    policy = make_policy("lru", Lanes.shared(3, 5))
    assert type(policy) is LRU is find_policy("lru")
    assert (policy.num_layers, policy.num_experts, policy.recency.shape) == (3, 5, (1, 15))


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PolicyError, match=r'no eviction policy is called "lruu": choose one of .*lfu, lifo, lru, '):
        make_policy("lruu", LANES)
    assert issubclass(PolicyError, OffloadError)


@pytest.mark.parametrize("searched_before", [False, True])
def test_a_policy_from_a_file_in_the_working_directory(
    in_user_folder: str, searched_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if searched_before:
        monkeypatch.syspath_prepend(Path.cwd())
    path = list(sys.path)
    policy = make_policy(f"{in_user_folder}:Newest", LANES)
    assert isinstance(policy, EvictionPolicy)
    assert policy.name == "Newest"
    assert repr(policy.params) == "Newest.Params(weight=1.0)"
    assert sys.path == path


def test_parameters_reach_the_policy(in_user_folder: str) -> None:
    policy = make_policy(f"{in_user_folder}:Newest(weight=2.5)", LANES)
    assert policy.params.weight == 2.5
    with pytest.raises(FrozenInstanceError):
        policy.params.weight = 3


@pytest.mark.parametrize(
    ("suffix", "complaint"),
    [
        (":Newest(wait=1)", "cannot take these parameters: it has weight, not wait"),
        (":Newest(weight=-1)", "cannot take these parameters: weight is below zero"),
        (":Newest(2)", "cannot take these parameters: write them as name"),
        (":Newest(weight=open)", "cannot take these parameters: write them as name"),
        (":Newest(**{})", "cannot take these parameters: write them as name"),
        (":Newest(weight=1", "cannot take these parameters: write them as name"),
        (":Newest(weight=1).x()", "cannot take these parameters: write them as name"),
        (":Missing", "cannot load .*AttributeError"),
        ("_missing:Newest", "cannot load .*ModuleNotFoundError"),
        ("_broken:Newest", "cannot load .*ZeroDivisionError"),
        ("_wordy:Newest", "cannot load .*OSError: two lines"),
        (":not_a_policy", "is not a subclass of cache.policy.EvictionPolicy"),
        (":Unfinished", "does not define priorities"),
        (":", "cannot load"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(in_user_folder: str, suffix: str, complaint: str) -> None:
    with pytest.raises(PolicyError, match=complaint) as caught:
        make_policy(in_user_folder + suffix, LANES)
    assert "\n" not in str(caught.value)
    assert in_user_folder in str(caught.value)


def test_built_in_policies_take_no_parameters_they_do_not_have() -> None:
    with pytest.raises(PolicyError, match=r'"lru.decay=0.5." cannot take these parameters: it takes no parameters'):
        make_policy("lru(decay=0.5)", LANES)


def test_a_name_is_given_once() -> None:
    registry: Registry[Part] = Registry("part", Part, [])

    class First(Part):
        name = "same"

    class Second(Part):
        name = "same"

    assert registry.register(First) is First
    assert registry.register(First) is First
    with pytest.raises(ValueError, match=r'"same" is taken by .*First'):
        registry.register(Second)
    assert registry.names() == ("same",)
