"""Files that change under a model: no token is said that rests on other weights than those it was loaded with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import StoppingCriteriaList

from cache.errors import TransferError
from offload.assembly import assemble

TOKENS = 8


def overwritten(file: Path, data: bytes) -> None:
    with file.open("r+b") as stream:
        stream.write(data)


def refilled(file: Path, data: bytes) -> None:
    file.write_bytes(data)


def replaced(file: Path, data: bytes) -> None:
    file.with_name("new").write_bytes(data)
    file.with_name("new").replace(file)


def in_secret(file: Path, data: bytes) -> None:
    before = file.stat()
    overwritten(file, data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # some systems' clocks tick slowly
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {act.__name__: act for act in (overwritten, refilled, replaced, in_secret)}


class Two:
    """A checkpoint, and the bytes of another one with the same header; each answers `prompt` in its own way."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.prompt = folder, tiny.ids(1, 5)
        tiny.save(folder, "qwen3_moe", num_hidden_layers=2, num_experts=16)
        self.shard = folder / "model.safetensors"
        self.answers, self.contents = [], []
        for seed in (1, 2):
            tiny.edit_tensors(folder, lambda tensors, seed=seed: scatter(tensors, seed))  # type: ignore[misc]
            answer = tiny.resident(folder).generate(self.prompt, max_new_tokens=TOKENS, do_sample=False)
            self.answers.append(answer.flatten().tolist())
            self.contents.append(self.shard.read_bytes())
        assert self.answers[0] != self.answers[1] and len(self.contents[0]) == len(self.contents[1])

    def begin(self, to: Path) -> Path:
        """The first checkpoint, fresh, as it was long ago."""
        shutil.copytree(self.folder, to)
        shard = to / "model.safetensors"
        shard.write_bytes(self.contents[0])
        os.utime(shard, ns=(10**18, 10**18))
        return shard


def scatter(tensors: dict[str, torch.Tensor], seed: int) -> None:
    """Other numbers; those of experts large enough that their answers differ."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        spread = 0.5 if "experts" in name else float(tensor.std())
        tensor.copy_(spread * torch.randn(tensor.shape, generator=generator))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    return Two(tmp_path_factory.mktemp("two") / "model")


class Said:
    """Notes the tokens as they come, with the prompt's before them."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.tokens += tokens.flatten().tolist()

    def end(self) -> None:
        """Nothing."""


def talk(two: Two, shard: Path, moment: str, act: Callable[[], object], said: Said, **options: Any) -> None:
    """Load the model and let it answer, and `act` at that moment."""
    steps = 0

    def step(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if moment == "fourth token" and steps == 4:
            act()
        return torch.zeros(1, dtype=torch.bool)

    with pytest.MonkeyPatch.context() as patch:
        if moment == "planned":
            prepare = assemble.prepare
            patch.setattr(assemble, "prepare", lambda *args: (prepare(*args), act())[0])
        with tiny.open_model(shard.parent, **{"expert_cache": tiny.FEW, **options}) as model:
            if moment == "loaded":
                act()
            criteria = StoppingCriteriaList([step])  # type: ignore[list-item]
            model.generate(
                two.prompt, max_new_tokens=TOKENS, do_sample=False, stopping_criteria=criteria, streamer=said
            )


@pytest.mark.parametrize("moment", ["planned", "loaded", "fourth token"])
@pytest.mark.parametrize("name", CHANGES)
def test_other_weights_are_never_read(two: Two, tmp_path: Path, name: str, moment: str) -> None:
    """The error comes before the first token that would rest on them. A file that was replaced is another one: whoever
    has the old one open goes on with the old weights."""
    shard, said = two.begin(tmp_path / "model"), Said()
    try:
        talk(two, shard, moment, lambda: CHANGES[name](shard, two.contents[1]), said)
    except TransferError as error:
        assert f"{shard} was changed while the model was running" in str(error)
        assert len(said.tokens) <= {"planned": 0, "loaded": 5, "fourth token": 9}[moment]
    else:
        assert name == "replaced" and moment == "fourth token" and len(said.tokens) == 5 + TOKENS
    assert said.tokens == two.answers[0][: len(said.tokens)]


@pytest.mark.parametrize("moment", ["loaded", "fourth token"])
@pytest.mark.parametrize(
    "act", [lambda file: file.chmod(0o600), lambda file: file.with_name("a link").hardlink_to(file)]
)
def test_permissions_and_links_do_not_matter(
    two: Two, tmp_path: Path, moment: str, act: Callable[[Path], object]
) -> None:
    shard, said = two.begin(tmp_path / "model"), Said()
    talk(two, shard, moment, lambda: act(shard), said)
    assert said.tokens == two.answers[0]


def test_neither_are_other_embeddings(tmp_path: Path) -> None:
    """Their shard is their own, and the only one that changes."""
    tiny.save(tmp_path, "qwen3_moe", shard_size="60KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    shard = tmp_path / index["model.embed_tokens.weight"]
    with tiny.open_model(tmp_path) as model:
        model(tiny.ids(1, 5))
        os.utime(shard, ns=(1, 1))
        with pytest.raises(TransferError, match=f"{shard} was changed while the model was running"):
            model(tiny.ids(1, 5))


@pytest.mark.parametrize("moment", ["loaded", "fourth token"])
@pytest.mark.parametrize("name", CHANGES)
def test_neither_are_other_records(two: Two, tmp_path: Path, name: str, moment: str) -> None:
    shard, said, store = two.begin(tmp_path / "model"), Said(), tmp_path / "store"
    options = {"experts": "int8", "expert_store": store, "expert_cache": tiny.FEW // 3}
    with tiny.open_model(shard.parent, **options) as model:
        expected = model.generate(two.prompt, max_new_tokens=TOKENS, do_sample=False).flatten().tolist()
    (records,) = store.glob("*.experts")
    other = bytes(byte ^ 0x11 for byte in records.read_bytes())
    os.utime(records, ns=(10**18, 10**18))
    try:
        talk(two, shard, moment, lambda: CHANGES[name](records, other), said, **options)
    except TransferError as error:
        assert f"{records} was changed while the model was running" in str(error)
    else:
        assert name == "replaced" and moment == "fourth token"
    assert said.tokens == expected[: len(said.tokens)]
