"""Turns by themselves: in the order of asking, given up by Ctrl-C; and the threads that torch gives a new thread."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch

from offload.assembly.turns import Turns
from offload.formats.cpu import threads

LONG = 30.0


def started(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_turns_come_in_the_order_of_asking() -> None:
    turns, order, waiting = Turns(), [], []

    def ask(name: int) -> None:
        with turns.taken():
            order.append(name)

    with turns.taken():
        for name in range(4):
            waiting.append(started(partial(ask, name)))
            while len(turns._waiting) <= name:
                time.sleep(0.001)
    for thread in waiting:
        thread.join(LONG)
    assert order == [0, 1, 2, 3]


def test_ctrl_c_while_waiting_gives_the_place_up(monkeypatch: pytest.MonkeyPatch) -> None:
    turns, held, go = Turns(), threading.Event(), threading.Event()

    def hold() -> None:
        with turns.taken():
            held.set()
            go.wait(LONG)

    holder = started(hold)
    assert held.wait(LONG)
    with monkeypatch.context() as patch:
        patch.setattr(turns._changed, "wait_for", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt), turns.taken():
            pass
    go.set()
    holder.join(LONG)
    with turns.taken(wait=False):
        pass


def test_a_thread_that_begins_while_another_computes_alone_has_all_its_threads() -> None:
    counts: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    with threads.alone():
        begun, go = threading.Event(), threading.Event()

        def later() -> None:
            torch.get_num_threads()
            begun.set()
            go.wait(LONG)
            threads.begin(3)
            counts.append(torch.get_num_threads())
            torch.set_num_threads(1)
            threads.begin(3)  # what it says itself later holds
            counts.append(torch.get_num_threads())

        thread = started(later)
        begun.wait(LONG)
    go.set()
    thread.join(LONG)
    torch.set_num_threads(before)
    assert counts == [3, 1]
