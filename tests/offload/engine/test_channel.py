"""A queue between threads: who comes first, and what can be taken back."""

from __future__ import annotations

from offload.engine.channel import Channel


def channel_of(*others: str) -> Channel[str]:
    channel: Channel[str] = Channel()
    channel.put(others, urgent=False)
    return channel


def rest(channel: Channel[str]) -> str:
    """What comes, in order."""
    return "".join(iter(lambda: channel.get(wait=False) or "", ""))


def test_what_is_urgent_overtakes_and_each_kind_keeps_its_order() -> None:
    channel = channel_of("a", "b")
    channel.put(["x", "y"], urgent=True)
    channel.put(["c"], urgent=False)
    channel.put(["d", "e"], urgent=False, first=True)
    assert rest(channel) == "xydeabc"


def test_what_becomes_urgent_comes_behind_what_is_so_already() -> None:
    channel = channel_of("a", "b", "c")
    channel.put(["x"], urgent=True)
    channel.hurry(lambda job: job in "bc")
    assert rest(channel) == "xbca"


def test_all_parts_of_a_job_are_taken_back_or_none() -> None:
    channel = channel_of("a", "a", "b", "b")
    assert channel.get() == "a"  # a worker has begun with it
    assert not channel.withdraw(lambda job: job == "a", 2)
    assert channel.withdraw(lambda job: job == "b", 2)
    assert rest(channel) == "a"


def test_once_closed_nothing_is_begun() -> None:
    channel = channel_of("a")
    channel.put(["x"], urgent=True)
    channel.close()
    channel.put(["y"], urgent=True)
    assert channel.get() is None
