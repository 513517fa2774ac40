"""Byte sizes and rates as people write them: "8G" and "8GiB" are 8 * 2**30 bytes, "8GB" is 8 * 10**9."""

from __future__ import annotations

import math
import re

from cache.errors import BudgetError

_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("", 1024), ("IB", 1024), ("B", 1000))
}
_MOST_BYTES = 2**70
_SIZE = re.compile(r"\s*(-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+))\s*([A-Za-z]*)\s*")


def parse_bytes(size: str | int | float, name: str = "size") -> int:
    """Bytes in `size`: a number of bytes, or text such as "900M", "8G", "8GiB", "7.5GB".

    Raises BudgetError, naming `name`, for anything that is not a positive, finite size.
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        unit = _UNITS.get(match[2].upper()) if match else None
        if match is None or unit is None:
            share = "; shares are not taken here" if "%" in size else ""
            raise BudgetError(f'{name}: cannot read "{size}" as a size: write it like 8G, 7.5GB or 900M{share}')
        value = float(match[1]) * unit
    elif isinstance(size, bool) or not isinstance(size, int | float):
        raise BudgetError(f"{name}: {size!r} is not a size: write it like 8G, 7.5GB or 900M")
    else:
        value = math.inf if size > _MOST_BYTES else float(size)
    if not math.isfinite(value) or value < 1:
        raise BudgetError(f"{name}: {size} is not a positive size: write it like 8G, 7.5GB or 900M")
    return int(value)


def parse_rate(rate: str | int | float, name: str = "link") -> float:
    """Bytes per second in `rate`: a number, or text such as "3GB/s". Raises BudgetError like `parse_bytes`."""
    if isinstance(rate, str):
        text = rate.strip()
        if not text.lower().endswith("/s"):
            raise BudgetError(f'{name}: cannot read "{rate}" as a speed: write it like 3GB/s')
        return float(parse_bytes(text[:-2], name))
    return float(parse_bytes(rate, name))


def format_bytes(size: float) -> str:
    """A size for people, in binary units: 9437184 -> "9.0 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB" if abs(size) < 1024 else f"{size / 1024:.2f} TiB"
