"""Calls of kernels that go on: their results, their order, and what is kept for them."""

from __future__ import annotations

import ctypes
import struct
import threading
import time
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from kernel_calls import BYTES, Memory, heads
from packed_nf4 import packed

from offload.formats import FORMATS
from offload.formats.cpu import begun, native
from offload.formats.cpu.nf4_experts import Nf4Rows
from offload.formats.cpu.routing import TokenRouter
from offload.formats.gate import SILU
from offload.formats.nf4 import code_int16

HIDDEN, INNER, EXPERTS, TOP_K = 256, 128, 8, 4

pytestmark = pytest.mark.skipif(not native.level(), reason="our kernels do not run here")


@pytest.fixture(autouse=True, params=[1, 2, 3])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    begun.wait()
    torch.set_num_threads(before)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


class Layer:
    """A token, its router and its experts."""

    def __init__(self, seed: int) -> None:
        matrices = [
            (packed(random(2 * INNER, HIDDEN, seed=100 * seed + i)), packed(random(HIDDEN, INNER, seed=100 * seed - i)))
            for i in range(EXPERTS)
        ]
        found = [FORMATS["nf4"].gated_place(*each) for each in matrices]
        self.places = [(0, 0, *each) for each in found if each is not None]
        self.x = 8 * random(1, HIDDEN, seed=seed).bfloat16()
        self.before = random(1, HIDDEN, seed=seed + 1).bfloat16()
        weight = random(EXPERTS, HIDDEN, seed=seed).bfloat16()
        self.router = TokenRouter(weight, TOP_K, of_chosen=True, scaled=False, rounds=False)
        for k in range(TOP_K):
            self.router.experts[k], self.router.weights[k] = (seed + k) % EXPERTS, (k + 1) / 10
        self._kept = matrices

    def begin(self) -> torch.Tensor:
        rows = Nf4Rows(self.x, code_int16(), 48, SILU)
        packed = [struct.pack(f"{len(place) - 1}q", *place[:-1]) for place in self.places]
        return rows.token([packed[e] for e in self.router.experts], INNER, self.router, self.before)

    def wanted(self) -> torch.Tensor:
        """By the call that does not go on."""
        y = torch.empty(TOP_K, HIDDEN, dtype=torch.bfloat16)
        rows = Nf4Rows(self.x, code_int16(), 48, SILU)
        spans = [(k, k + 1) for k in range(TOP_K)]
        rows.compute([self.places[e] for e in self.router.experts], torch.arange(TOP_K), spans, y)
        total = (y.float() * torch.tensor(self.router.weights)[:, None]).sum(0).bfloat16()
        return self.before + total


LAYERS = [Layer(seed) for seed in range(1, 6)]
WANTED = [layer.wanted() for layer in LAYERS]


def test_what_was_begun_is_there_after_waiting() -> None:
    for _ in range(200):
        for layer, wanted in zip(LAYERS, WANTED, strict=True):
            found = layer.begin()
            begun.wait()
            assert torch.equal(found, wanted) and not begun.is_under_way()


def test_the_next_call_is_begun_when_the_one_before_is_done() -> None:
    for _ in range(200):
        found = [layer.begin() for layer in LAYERS]
        assert all(torch.equal(a, b) for a, b in zip(found[:-1], WANTED, strict=False))
        begun.wait()
        assert torch.equal(found[-1], WANTED[-1])


def test_what_a_call_needs_is_kept_until_then() -> None:
    layer = Layer(9)
    layer.begin()
    kept = weakref.ref(layer.router)
    del layer
    assert kept() is not None and begun.is_under_way()
    begun.wait()
    assert kept() is None


def test_a_sublayer_is_computed_when_what_was_begun_is_done() -> None:
    library, area = native.library(), np.zeros(BYTES, np.uint8)
    assert library is not None
    call = next(each for each in heads(Memory(area.ctypes.data)) if each.function == "token_sublayer")
    library.token_sublayer(ctypes.string_at(call.numbers[0], 1000), 2)
    wanted, done = call.outputs[0].copy(), []
    call.outputs[0][:] = 0

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)
    def slow(*_: int) -> None:
        time.sleep(0.05)
        done.append(bool(call.outputs[0].any()))

    library.pool_begin(ctypes.cast(slow, ctypes.c_void_p), None, torch.get_num_threads())
    library.token_sublayer(ctypes.string_at(call.numbers[0], 1000), 2)
    assert done == [False] and np.array_equal(call.outputs[0], wanted)


def test_threads_that_begin_calls_at_once_get_their_own_results() -> None:
    wrong: list[int] = []
    threads = torch.get_num_threads()

    def work(number: int) -> None:
        torch.set_num_threads(threads)
        layer, wanted = LAYERS[number], WANTED[number]
        for _ in range(300):
            found = layer.begin()
            begun.wait()
            if not torch.equal(found, wanted):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    assert not wrong
