"""Ctrl-C waits for the end of a block, but is heard at once, and not held back twice."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from offload.system.interrupts import held_back


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_is_raised_at_the_end() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), held_back():
        press()
        reached = True
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_one_is_raised_at_once() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), held_back():
        press()
        press()
        reached = True
    assert not reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_of_the_block_is_the_context_of_the_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt) as raised, held_back():
        press()
        raise ValueError
    assert isinstance(raised.value.__context__, ValueError)


def test_a_handler_of_ones_own_hears_of_it_at_once() -> None:
    heard = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with held_back():
            press()
            assert heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, previous)


def test_where_ctrl_c_is_ignored_it_stays_so() -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held_back():
            press()
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_other_threads_are_left_alone() -> None:
    def handler() -> object:
        with held_back():
            return signal.getsignal(signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(handler).result() is signal.default_int_handler
