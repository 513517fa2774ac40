"""The kernels in C for the nested format, and what serves without them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from offload.formats.cpu import native

CHOICES = {"plain": native.NONE, "avx2": native.AVX2, "avx512": native.AVX512}


@pytest.fixture(params=CHOICES)
def nested_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each way that this CPU has."""
    choice = CHOICES[request.param]
    library = native.library()
    if choice == native.NONE:
        monkeypatch.setattr("offload.formats.cpu.nested.nested_library", lambda: None)
    elif library is None or library.nested_choose(choice) != choice:
        pytest.skip("not built, or not for this CPU")
    yield request.param
    if library is not None:
        library.nested_choose(native.AVX512)
