"""JSON files made wrong: a field's value, fields too many or too few, or the text itself."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

from scripts.fuzz.values import ANY, FIELDS, another


def mutate_field(random: Random, path: Path) -> str:
    """Changes one field of the JSON object in `path`, at any depth; says which and how."""
    found = json.loads(path.read_text(encoding="utf-8"))
    places = list(_places(found))
    special = sorted(FIELDS.get(path.name, {}))
    if special and random.random() < 0.4:
        name = random.choice(special)
        holder: Any = found
        value = another(random, name, path.name, holder.get(name))
        holder[name], said = value, f"{name} = {_short(value)}"
    elif not places:
        return "nothing"
    else:
        holder, key = random.choice(places)
        said = _change(random, path.name, holder, key, places)
    path.write_text(json.dumps(found), encoding="utf-8", errors="surrogatepass")
    return f"{path.name}: {said}"


def _change(random: Random, file: str, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> str:
    way = random.random()
    if way < 0.15:
        del holder[key]
        return f"without {key}"
    if way < 0.25:
        other, at = random.choice(places)
        holder[key], other[at] = other[at], holder[key]
        if _loops(holder):
            holder[key] = None
        return f"{key} and {at} swapped"
    value = another(random, str(key), file, holder[key])
    holder[key] = value
    return f"{key} = {_short(value)}"


def mutate_text(random: Random, path: Path) -> str:
    """Changes the file as a file: cut, empty, of another encoding, of another shape, no file at all; says how."""
    how = random.choice(sorted(_WHOLE))
    data = path.read_bytes()
    path.unlink()
    _WHOLE[how](random, path, data)
    return f"{path.name}: {how}"


def _flipped(random: Random, path: Path, data: bytes) -> None:
    changed = bytearray(data or b"{}")
    for _ in range(random.randint(1, 3)):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    path.write_bytes(changed)


def _device(random: Random, path: Path, data: bytes) -> None:
    path.symlink_to(random.choice(["/dev/zero", "/dev/null", "/nowhere", path.name]))


_WHOLE: Mapping[str, Callable[[Random, Path, bytes], object]] = {
    "removed": lambda random, path, data: None,
    "empty": lambda random, path, data: path.write_bytes(b""),
    "cut": lambda random, path, data: path.write_bytes(data[: random.randrange(len(data) or 1)]),
    "with a byte order mark": lambda random, path, data: path.write_bytes(b"\xef\xbb\xbf" + data),
    "in UTF-16": lambda random, path, data: path.write_bytes(data.decode("utf-8", "replace").encode("utf-16")),
    "not in UTF-8": lambda random, path, data: path.write_bytes(data.replace(b'"', b'"\xff', 1)),
    "nested for ever": lambda random, path, data: path.write_bytes(b"[" * 100_000),
    "another kind": lambda random, path, data: path.write_bytes(json.dumps(random.choice(ANY)).encode()),
    "a list of itself": lambda random, path, data: path.write_bytes(b"[" + data + b"]"),
    "a folder": lambda random, path, data: path.mkdir(),
    "a pipe": lambda random, path, data: os.mkfifo(path),
    "a device": _device,
    "bits flipped": _flipped,
    "a Git LFS pointer": lambda random, path, data: path.write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize {len(data)}\n"
    ),
}


def _places(found: Any) -> Iterator[tuple[Any, Any]]:
    """Every (holder, key) in a JSON value, of at most the first forty of a long list or object."""
    if not isinstance(found, dict | list):
        return
    for key in list(found if isinstance(found, dict) else range(len(found)))[:40]:
        yield found, key
        yield from _places(found[key])


def _loops(value: Any) -> bool:
    try:
        json.dumps(value)
    except (ValueError, RecursionError):
        return True
    return False


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
