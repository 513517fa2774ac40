"""The thread that computes on the CPU beside an accelerator."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from types import FrameType
from typing import Any

import pytest
import torch

from offload.device.emulated import EmulatedDevice
from offload.engine import host
from offload.engine.host import HostWorker


@pytest.fixture
def worker() -> Iterator[HostWorker]:
    worker = HostWorker(EmulatedDevice(1e9), threads=1)
    yield worker
    worker.close()


def test_jobs_run_in_order_and_errors_come_with_join(worker: HostWorker) -> None:
    done: list[int] = []
    worker.start(lambda: done.append(1))
    worker.start(lambda: 1 // 0, after=lambda: done.append(2))
    worker.start(lambda: done.append(3))
    assert worker.started == 3
    with pytest.raises(ZeroDivisionError):
        worker.join()
    assert done == [1, 2, 3] and worker.started == 0 and worker.busy_s > 0
    worker.join()


@pytest.mark.parametrize("threads", [1, 3, 5])
def test_its_products_may_use_as_many_threads_as_it_was_given(threads: int) -> None:
    """A new thread would have as many as the process began with. The thread that starts it keeps its own number."""
    counted: list[int] = []
    outside = torch.get_num_threads()
    worker = HostWorker(EmulatedDevice(1e9), threads)
    for _ in range(2):
        worker.start(lambda: counted.append(torch.get_num_threads()))
        worker.join()
    worker.close()
    assert counted == [threads, threads] and torch.get_num_threads() == outside


def test_whatever_ends_a_job_the_thread_goes_on(worker: HostWorker) -> None:
    def leave() -> None:
        raise SystemExit

    worker.start(leave)
    worker.start(lambda: None, after=lambda: 1 // 0)
    with pytest.raises(SystemExit):
        worker.join()
    worker.start(lambda: None)
    worker.join()


def test_whoever_was_thrown_out_of_a_join_can_join_again() -> None:
    """At any call within it, or return."""
    for at in range(1, 12):
        left = at

        def throw(frame: FrameType, what: str, _: Any) -> None:
            nonlocal left
            if what in ("call", "return") and frame.f_code.co_filename == host.__file__:
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt

        worker, ran = HostWorker(EmulatedDevice(1e9), 1), list[int]()
        try:
            worker.start(lambda ran=ran: ran.append(1))
            sys.setprofile(throw)
            with suppress(KeyboardInterrupt):
                worker.join()
            sys.setprofile(None)
            worker.join()
            assert ran == [1]
            assert not worker.started
        finally:
            sys.setprofile(None)
            worker.close()
