"""Storage formats of experts' matrices: 8 bits, 4 bits, and a nested one of 8, 4, 3 and 2 bits."""

from __future__ import annotations

from cache.errors import FormatError
from offload.formats.base import Field, Fields, Format, GatedRows
from offload.formats.gate import Gate
from offload.formats.int8 import Int8
from offload.formats.nested import Nested
from offload.formats.nf4 import NF4

__all__ = ["FORMATS", "Field", "Fields", "Format", "Gate", "GatedRows", "find_format"]

FORMATS: dict[str, Format] = {form.name: form for form in (Int8(), NF4(), Nested())}


def find_format(name: str) -> tuple[Format, str]:
    """The format and level that `name` says: a format's name or title (its best level then), or a level's name.

    Raises FormatError when nothing is called so.
    """
    for form in FORMATS.values():
        if name in form.levels:
            return form, name
        if name in (form.name, form.title):
            return form, form.levels[0]
    known = [name for form in FORMATS.values() for name in (form.title, *form.levels)]
    raise FormatError(f'no format is called "{name}": choose one of {", ".join(dict.fromkeys(known))}')
