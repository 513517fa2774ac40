"""An error at any call of a pass: the next call gives the right bits, and everything is in order again.

The error is thrown as a function of the engine, the decision loop, the caches or the predictors is entered or left on
the computing thread. A prefix of calls fills the caches and fetches ahead, so that there is something to lose.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import tiny
import torch

import offload
from cache.types import RoutingEvent
from offload.decide.fallbacks.base import Candidate, Choice, Fallback
from offload.engine.starting_over import in_order
from offload.model import OffloadedModel

ROOT = Path(offload.__file__).parent.parent
WATCHED = tuple(
    str(ROOT / room) for room in ("offload/engine", "offload/decide", "offload/device/arena.py", "cache", "predictors")
)
ARGUMENTS: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
PROMPT = tiny.ids(1, 8)
SITES = 8
"""In `make test`, of each model opened; `make test-all` throws at each site."""


class Thrown(Exception):
    """What no code of ours expects."""


class Odd(Fallback):
    """Every second expert is served at the lowest precision, resident or not: the same answer every time."""

    name = "odd"

    def target(self, key: Any) -> int:
        return (self.precisions - 1) * (key.expert % 2)

    def choose(self, event: RoutingEvent, candidates: Sequence[Candidate], spare_s: float) -> list[Choice]:
        return [Choice(candidate.target) for candidate in candidates]


class Calls:
    """Counts the calls that enter or leave what is watched, and throws at number `at`."""

    def __init__(self, at: int = -1, error: type[BaseException] = Thrown) -> None:
        self.count = 0
        self.sites: dict[object, list[int]] = {}
        """The numbers of the calls, by the line that calls and the line that is entered or left."""
        self.at, self.error = at, error

    def __call__(self, frame: FrameType, what: str, _: Any) -> None:
        if what in ("call", "return") and frame.f_code.co_filename.startswith(WATCHED):
            self.count += 1
            if self.count == self.at:
                raise self.error
            caller = frame.f_back
            site = frame.f_code, frame.f_lineno, what, caller and caller.f_code, caller and caller.f_lineno
            self.sites.setdefault(site, []).append(self.count)

    def every_site(self) -> list[int]:
        """The first call of each site, one in the midst, and the last."""
        return sorted({at for site in self.sites.values() for at in (site[0], site[len(site) // 2], site[-1])})


@contextmanager
def watched(calls: Calls) -> Iterator[Calls]:
    sys.setprofile(calls)
    try:
        yield calls
    finally:
        sys.setprofile(None)


SETUPS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "cpu, several slices": {"fallback": f"{__name__}:Odd", "experts": "int8>int4"},
    "accelerator": {"device": "emulated"},
    "accelerator, several precisions": {"device": "emulated", "fallback": f"{__name__}:Odd", "experts": "auto,int8"},
    "accelerator, the CPU beside it": {"device": "emulated", "scheduler": "cpu-only"},
}


def opened(checkpoint: Path, setup: str) -> OffloadedModel:
    """Few experts fit, and the gates are asked two layers ahead, where that may be."""
    arguments = {"predictor": "cross-layer-gate", "prefetch_depth": 2} | SETUPS[setup]
    return tiny.open_model(checkpoint, expert_cache=tiny.FEW, **arguments)


def answer(model: OffloadedModel) -> torch.Tensor:
    return model.generate(PROMPT, output_scores=True, return_dict_in_generate=True, **ARGUMENTS).scores


def same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(tiny.same_bits, a, b))


def check_order(model: OffloadedModel) -> None:
    """Caches, slots and staging agree, and every slot has its expert's bytes."""
    runtime = model.parts.runtime
    runtime.settle()
    engine, store = runtime.engine, model.parts.store
    assert in_order(runtime.manager, engine)
    assert not engine._urgent and not engine._prefetches and engine._landed.empty()
    assert [places.qsize() for places in engine._host_staging] == [model.plan.places] * len(store.slices)
    if model.parts.device.is_accelerator:
        assert len(engine._staging._bundles) == model.plan.places and not engine._staging._unstaged
    for slice_, caches in enumerate(runtime.manager.stacks.by_slice):
        with closing(store.slices[slice_].open()) as reader:
            for cache in caches:
                for key in cache.resident():
                    slot = engine.slot(cache.tier, key, slice_)
                    zeros, ones = torch.zeros_like(slot), torch.full_like(slot, 255)
                    for fresh in (zeros, ones):
                        reader.read(key, fresh)
                    written = zeros == ones
                    assert torch.equal(slot[written], zeros[written]), f"{key} in {cache.tier}"


# A generator that is left is ended by Python itself, which can only report an error there.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize(
    ("error", "every"),
    [(Thrown, False), (KeyboardInterrupt, False), pytest.param(Thrown, True, marks=pytest.mark.full)],
    ids=["error", "ctrl-c", "every"],
)
def test_an_error_anywhere_leaves_nothing_undone(
    checkpoint: Path, setup: str, error: type[BaseException], every: bool
) -> None:
    with opened(checkpoint, setup) as model:
        expected = answer(model)
        with watched(Calls()) as calls:
            assert same(answer(model), expected)
        thrown = 0
        for at in calls.every_site() if every else range(1, calls.count, calls.count // SITES):
            with suppress(error), watched(Calls(at, error)):
                answer(model)
                thrown -= 1
            thrown += 1
            assert same(answer(model), expected), f"after an error at call {at} of {calls.count}"
            if every or not at % 5:
                check_order(model)
        assert thrown > SITES // 2  # some are caught on the way, as by what asks the gates


def test_one_ctrl_c_waits_for_the_end_of_a_pass(checkpoint: Path) -> None:
    """So nothing has to start over."""
    ended: list[bool] = []
    with tiny.open_model(checkpoint) as model:
        inside = model.module.model
        inside.layers[0].register_forward_pre_hook(lambda *_: signal.raise_signal(signal.SIGINT))
        inside.norm.register_forward_hook(lambda *_: ended.append(True))
        with pytest.raises(KeyboardInterrupt):
            model(tiny.ids(1, 5))
    assert ended == [True]
