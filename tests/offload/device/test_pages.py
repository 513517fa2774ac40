"""Memory for weights: private, and in huge pages where the system gives some, as reading it from there is faster."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from offload.device.arena import HostRegion

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SUMMED_UP = Path("/proc/self/smaps_rollup")


def in_memory(kind: str) -> int:
    """Bytes of this process."""
    found = re.search(rf"^{kind}: *(\d+) kB", SUMMED_UP.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.skipif(not SUMMED_UP.exists(), reason="the system does not say what memory is like")
def test_a_region_is_private_and_there() -> None:
    before, shared = in_memory("Rss"), in_memory("Pss_Shmem")
    region = HostRegion(2**26)
    assert in_memory("Rss") - before >= 2**26
    assert in_memory("Pss_Shmem") - shared < 2**20
    assert region.tensor.data_ptr() % 2**21 == 0 and not region.array.any()


@pytest.mark.skipif(
    not (SUMMED_UP.exists() and SETTING.exists()) or "[never]" in SETTING.read_text(),
    reason="the system gives no huge pages",
)
def test_a_region_is_in_huge_pages() -> None:
    before = in_memory("AnonHugePages")
    region = HostRegion(2**26)
    assert in_memory("AnonHugePages") > before, "of 64 MiB nothing is in huge pages"
    assert region.tensor.numel() == 2**26
