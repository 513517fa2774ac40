"""Precisions by name, and what they are stored as."""

from __future__ import annotations

import pytest
import torch

from cache.errors import FormatError
from offload.costs.precision import NESTED, NESTED_BITS, QUANTISED_BITS, parse_precisions
from offload.formats import FORMATS, Format
from offload.formats.precision import form_of


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("auto", ["auto"]),
        ("bf16", ["bf16"]),
        ("auto,nf4", ["auto", "nf4"]),
        ("int8", ["int8"]),
        ("int4", ["nested4"]),
        ("int4,int2", ["nested4", "nested2"]),
        ("int8>int4>int2", ["nested8", "nested4", "nested2"]),
        ("int8 > int2", ["nested8", "nested2"]),
        ("int3", ["nested3"]),
        ("int4>int3>int2", ["nested4", "nested3", "nested2"]),
        ("auto,int4>int2", ["auto", "nested4", "nested2"]),
    ],
)
def test_precisions_by_name(text: str, names: list[str]) -> None:
    assert parse_precisions(text) == names
    assert all(isinstance(form_of(name), (Format, torch.dtype)) for name in names if name != "auto")


@pytest.mark.parametrize(
    "text", ["", "fp4", "int4>int8", "int8>nf4", "nf4,nf4", "nested", "int5", "int3>int4", "int2,int4"]
)
def test_precisions_that_do_not_exist(text: str) -> None:
    with pytest.raises(FormatError):
        parse_precisions(text)


def test_every_format_can_be_named() -> None:
    assert {name for name, form in FORMATS.items() if len(form.levels) == 1} == QUANTISED_BITS.keys()
    (nested,) = (form for form in FORMATS.values() if len(form.levels) > 1)
    assert nested.title == ">".join(NESTED) and nested.levels == tuple(NESTED.values()) == tuple(NESTED_BITS)


def test_bits_of_a_weight_are_what_the_formats_store() -> None:
    n, k = 512, 4096
    for form in FORMATS.values():
        nbytes = [sum(field.nbytes for field in added) for added in form.fields(n, k)]
        stated = [NESTED_BITS[level] for level in form.levels] if len(nbytes) > 1 else [QUANTISED_BITS[form.name]]
        assert [8 * each / (n * k) for each in nbytes] == pytest.approx(stated[::-1], abs=0.01)
