"""A rig of every shape."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny
from transfer_rig import SETUPS, Rig, device_of

from offload.engine.transfer import READERS


@pytest.fixture(
    params=[(setup, *how) for setup in SETUPS for how in ((1, READERS), (2, READERS), (1, 5), (4, 5))],
    ids=lambda p: f"{p[0]}, parts: {p[1]}, readers: {p[2]}",
)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    setup, parts, readers = request.param
    kind, slots = SETUPS[setup]
    rig = Rig(tiny.FakeStore(parts), device_of(kind), slots, readers=readers)
    yield rig
    rig.check_idle()
    rig.close()
