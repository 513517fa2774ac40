"""One channel under the simulated clock: who comes first, and what may overtake whom."""

from __future__ import annotations

import pytest

from cache.types import ExpertKey, Tier
from offload.decide.pace import CHUNK_BYTES
from offload.decide.plan import Fetch
from offload.simulation.channels import Channel, Job

CHUNK_S = 4.0
"""What a chunk takes."""


def channel_of(*jobs: Job) -> Channel:
    channel = Channel(lambda job, alone: job.nbytes / CHUNK_BYTES * CHUNK_S, free_s=0.0)
    channel.jobs += jobs
    return channel


def job(expert: int, *, urgent: bool, chunks: float = 1, ready_s: float = 0.0) -> Job:
    nbytes = int(chunks * CHUNK_BYTES)
    return Job(Fetch(ExpertKey(0, expert), Tier.DISK), urgent, nbytes, nbytes, ready_s)


def order(channel: Channel) -> list[tuple[int, float]]:
    """(expert, when the channel is free again), step by step."""
    found = []
    while (following := channel.next()) is not None:
        start_s, moved = following
        channel.work(start_s, moved)
        found.append((moved.fetch.key.expert, channel.free_s))
    return found


def test_what_is_urgent_overtakes_and_each_kind_keeps_its_order() -> None:
    jobs = [job(e, urgent=urgent) for e, urgent in enumerate((False, True, False, True))]
    assert order(channel_of(*jobs)) == [(1, 4.0), (3, 8.0), (0, 12.0), (2, 16.0)]


def test_a_prefetch_lets_what_is_urgent_pass_after_each_chunk() -> None:
    """It comes while the first chunk is moved; all of it goes in one go, and then the rest of the prefetch."""
    channel = channel_of(job(0, urgent=False, chunks=2.5), job(1, urgent=True, chunks=3, ready_s=1.0))
    assert order(channel) == [(0, 4.0), (1, 16.0), (0, 20.0), (0, pytest.approx(22.0))]


def test_what_is_not_ready_overtakes_nobody() -> None:
    assert order(channel_of(job(0, urgent=False), job(1, urgent=True, ready_s=9.0))) == [(0, 4.0), (1, 13.0)]
