"""One input: a family's checkpoint with a few things changed, and a command line; all of it follows from a number."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from scripts.fuzz.commands import Command, make_command
from scripts.fuzz.jsons import mutate_field, mutate_text
from scripts.fuzz.texts import mutate_template
from scripts.fuzz.weights import mutate_weights, prefix_all

_Mutate = Callable[[Random, Path], str]


@dataclass(frozen=True)
class Case:
    """`folder` has the checkpoint, `changes` say what is wrong with it, `original` is the one that it was.

    With `renamed` the model is the original's, which transformers does not see.
    """

    number: int
    folder: Path
    original: Path
    changes: Sequence[str]
    command: Command
    renamed: bool


def make_case(seed: int, number: int, originals: Mapping[str, Path], folder: Path) -> Case:
    """Writes the input `number` of `seed` to `folder`, which must not be there yet."""
    random = Random(f"{seed}:{number}")
    family = random.choice(sorted(originals))
    shutil.copytree(originals[family], folder)
    name = random.choices(["generate", "chat", "plan"], [6, 3, 1])[0]
    renamed = random.random() < 0.02
    if renamed:
        changes = [prefix_all(random, folder)]
        mutated = 0
    else:
        count = random.choices([0, 1, 2, 3], [1, 6, 2, 1])[0]
        changes = [_change(random, folder, name) for _ in range(count)]
        mutated = random.choices([0, 1, 2, 3], [6, 2, 1, 1])[0] if count else random.randint(1, 3)
    return Case(number, folder, originals[family], changes, make_command(random, mutated, name), renamed)


def _field_of(file: str) -> _Mutate:
    return lambda random, folder: _to_file(mutate_field, random, folder / file)


def _text_of(file: str) -> _Mutate:
    return lambda random, folder: _to_file(mutate_text, random, folder / file)


def _to_file(mutate: _Mutate, random: Random, path: Path) -> str:
    return "nothing" if path.is_symlink() or not path.is_file() else mutate(random, path)


_CHANGES: Sequence[tuple[int, _Mutate]] = (
    (30, _field_of("config.json")),
    (3, _text_of("config.json")),
    (30, mutate_weights),
    (15, _field_of("generation_config.json")),
    (2, _text_of("generation_config.json")),
    (6, _field_of("tokenizer_config.json")),
    (5, _field_of("tokenizer.json")),
    (2, _text_of("tokenizer.json")),
    (1, _text_of("tokenizer_config.json")),
)
_TEMPLATE = 25  # its share, where it is used


def _change(random: Random, folder: Path, command: str) -> str:
    weights, mutations = zip(*_CHANGES, (_TEMPLATE if command == "chat" else 2, mutate_template), strict=True)
    mutate: _Mutate = random.choices(mutations, weights)[0]
    try:
        return mutate(random, folder)
    except Exception:  # an earlier change left nothing that can be changed
        return "nothing"
