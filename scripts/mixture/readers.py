"""Plain text out of the files of packages: compressed, marked up, or in the formats of R and of SWORD."""

from __future__ import annotations

import gzip
import html
import re
import struct
import zlib
from pathlib import PurePosixPath

_HIDDEN = re.compile(r"<(script|style|head)\b.*?</\1>", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"<[^>]*>")
_BLANK = re.compile(r"\n\s*\n+")
_VERSE = re.compile(r"<(?=(verse|chapter|title)\b)")  # SWORD has them all in one line
_STRINGS = 16  # R's type for a vector of strings


def plain_text(name: str, content: bytes) -> str:
    """The text of one file, as its name says how to read it. What is no UTF-8 is read as Latin-1."""
    path = PurePosixPath(name)
    if path.suffix in {".gz", ".dz"}:
        content, path = gzip.decompress(content), path.with_suffix("")
    if path.suffix == ".rdb":
        return "\n\n".join("\n".join(r_strings(stream)) for stream in _streams(content, header=4))
    if path.suffix == ".bzz":
        verses = "\n".join(stream.decode(errors="replace") for stream in _streams(content))
        return without_tags(_VERSE.sub(r"\n<", verses))
    text = _decoded(content)
    return without_tags(text) if path.suffix in {".html", ".htm"} else text


def without_tags(text: str) -> str:
    """The text of HTML or XML, paragraphs apart."""
    return _BLANK.sub("\n\n", html.unescape(_TAG.sub("", _HIDDEN.sub("", text)))).strip()


def r_strings(data: bytes) -> list[str]:
    """A vector of strings as R serialises it (version 3, big-endian), which is all of `data`."""
    at = 14  # "X\n" and three versions
    at += 4 + struct.unpack_from(">i", data, at)[0]  # the name of the encoding
    kind, count = struct.unpack_from(">ii", data, at)
    if kind & 255 != _STRINGS:
        raise ValueError(f"R's type {kind & 255}, not a vector of strings")
    at += 8
    found = []
    for _ in range(count):
        _, length = struct.unpack_from(">ii", data, at)
        at += 8
        found.append(data[at : at + max(length, 0)].decode())
        at += max(length, 0)
    return found


def _streams(data: bytes, header: int = 0) -> list[bytes]:
    """The zlib streams that lie one behind the other in `data`, each behind `header` bytes or none but zeros."""
    found = []
    while len(data) > header:
        stream = zlib.decompressobj()
        found.append(stream.decompress(data[header:]))
        data = stream.unused_data if header else stream.unused_data.lstrip(b"\0")
    return found


def _decoded(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("latin-1")
