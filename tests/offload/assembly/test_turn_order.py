"""Turns by themselves: in the order of asking, given up by Ctrl-C; and the threads that torch gives a new thread."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch

from cache.errors import BusyError
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
    with pytest.raises(BusyError), turns.taken(wait=False):  # the turn is still the holder's
        pass
    go.set()
    holder.join(LONG)
    with turns.taken(wait=False):
        pass


def test_whose_turn_ctrl_c_gives_up_lets_the_next_one_in(monkeypatch: pytest.MonkeyPatch) -> None:
    turns, go = Turns(), threading.Event()
    held, real, main = threading.Event(), turns._changed.wait_for, threading.current_thread()

    def hold() -> None:
        with turns.taken():
            held.set()
            go.wait(LONG)

    def ask() -> None:
        with turns.taken():
            pass

    def wait_for(predicate: Callable[[], bool]) -> bool:
        if threading.current_thread() is not main:
            return real(predicate)
        second.start()
        while len(turns._waiting) < 2:
            turns._changed.wait(0.001)
        go.set()
        assert real(predicate, LONG)
        turns._changed.wait(0.05)  # the second one finds out that it is not the first
        signal.raise_signal(signal.SIGINT)
        return True

    first, second = started(hold), threading.Thread(target=ask, daemon=True)
    assert held.wait(LONG)
    monkeypatch.setattr(turns._changed, "wait_for", wait_for)
    with pytest.raises(KeyboardInterrupt), turns.taken():
        pass
    for thread in (first, second):
        thread.join(LONG)
        assert not thread.is_alive()


def test_who_comes_when_the_turn_is_another_s_already_is_behind_it() -> None:
    turns = Turns()
    turns._waiting.append(object())  # it was told that the turn is free, and has not run yet
    with pytest.raises(BusyError, match="another thread"), turns.taken(wait=False):
        pass


def test_a_pass_in_a_fork_that_began_within_a_turn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the thread is the holder still, by its number, and the model's threads are not there."""
    turns = Turns()
    with turns.taken():
        with turns.for_pass():
            pass
        with monkeypatch.context() as patch:
            patch.setattr("os.getpid", lambda: -1)
            with pytest.raises(RuntimeError, match="this one is a fork"), turns.for_pass():
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
