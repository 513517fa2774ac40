"""The thread that computes experts on the CPU while the accelerator computes others."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import torch

from offload.device.base import Device

Job = Callable[[], object]


class HostWorker:
    """Runs jobs one after the other, in the order in which they were started. One thread starts and joins.

    `device` says which cores it may use, `threads` how many threads its products may.
    """

    def __init__(self, device: Device, threads: int) -> None:
        self.busy_s = 0.0
        """Seconds spent on jobs so far; steady after `join`."""
        self._uses = device, threads
        self._begin()

    def _begin(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Job, Job | None] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._started = self._ended = 0  # jobs that nobody has joined yet
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, args=self._uses, name="offload-host-compute", daemon=True)
        self._thread.start()

    @property
    def started(self) -> int:
        """Jobs that nobody has joined yet."""
        return self._started

    def start(self, job: Job, after: Job | None = None) -> None:
        """Run `job` and then `after`, also if the job failed, on the worker's thread."""
        self._jobs.put((job, after))
        self._started += 1

    def join(self) -> None:
        """Wait for everything started. Raises what the first failed job did."""
        with self._changed:  # the worker counts, so that an error in here can be followed by another `join`
            self._changed.wait_for(lambda: self._ended >= self._started)
            error, self._error = self._error, None
            self._started = self._ended = 0
        if error is not None:
            raise error

    def restart(self) -> None:
        """Forget every job and how it ended, after they have, and begin anew."""
        self.close()
        self._begin()

    def close(self) -> None:
        """Stop the thread, after what was started."""
        self._jobs.put(None)
        self._thread.join()

    def _loop(self, device: Device, threads: int) -> None:
        device.start_worker()
        torch.set_num_threads(threads)  # of this thread: each has a number of its own
        with torch.no_grad():
            while (work := self._jobs.get()) is not None:
                error = self._run(*work)
                del work  # what it holds is free again while the thread waits
                with self._changed:
                    self._ended += 1
                    self._error = self._error or error
                    self._changed.notify_all()
                del error

    def _run(self, job: Job, after: Job | None) -> BaseException | None:
        start = time.perf_counter()
        try:
            try:
                job()
            finally:
                if after is not None:
                    after()
        except BaseException as error:  # handed to the computing thread, which raises it
            return error
        finally:
            self.busy_s += time.perf_counter() - start
        return None
