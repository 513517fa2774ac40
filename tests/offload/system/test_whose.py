"""Whose error it is: found from the calls that were under way."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from cache.registry import Part, Registry
from offload.system.sizes import parse_bytes
from offload.system.whose import calls, culprit, place


def raised(nonsense: object) -> BaseException:
    """What is raised for a size that is none."""
    try:
        parse_bytes(nonsense)  # type: ignore[arg-type]
    except Exception as error:
        return error
    raise AssertionError


def test_the_call_of_this_program_that_was_reached_last_is_the_place() -> None:
    error = raised("much")
    assert place(error).startswith("offload/system/sizes.py:")
    assert not calls(error)[0].ours  # the test itself
    assert calls(error)[-1].module == "offload.system.sizes"


def test_of_other_programs_it_is_wherever_the_error_was_raised() -> None:
    with pytest.raises(ValueError) as caught:
        json.loads("x")
    assert "json/decoder.py:" in place(caught.value)
    assert place(ValueError()) == "no place"


def test_an_error_that_another_process_sent_has_its_calls_there() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        error = pool.submit(parse_bytes, "much").exception()
    assert error is not None and place(error).startswith("offload/system/sizes.py:")


class Failing(Part):
    """A part of the user's own."""

    def fail(self) -> None:
        raise KeyError("x")


def test_the_part_whose_method_was_reached_last_is_the_culprit() -> None:
    with pytest.raises(KeyError) as caught:
        Failing(1, 1).fail()
    assert culprit(caught.value) is None
    Registry("policy", Part, ()).find(f"{__name__}:Failing")
    assert culprit(caught.value) == f'policy "{__name__}:Failing"'
