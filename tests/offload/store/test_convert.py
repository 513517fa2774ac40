"""Converted experts: records, checksums, resuming, repair, and that a store serves no other checkpoint."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from tiny_store import NAMES, contents, converted, keys, mapped, origin

from cache.errors import BudgetError, DiskSpaceError
from cache.types import ExpertKey
from offload.costs.precision import parse_precisions
from offload.options import PlanOptions
from offload.store import convert as converting
from offload.store.convert import convert
from offload.store.files import BLOCK
from offload.store.index import INDEX, StoreIndex
from offload.store.plain import CheckpointSlice
from offload.store.precisions import PrecisionStore
from offload.store.record import StoredMatrix, layouts_of, store_bytes
from offload.system.progress import Bar

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain design, and one that is transposed and has biases."""
    return tiny.save(tmp_path_factory.mktemp(request.param), request.param, torch.bfloat16)


class Begun(Bar):
    """Notes (bytes in all, bytes done) as a conversion begins."""

    def __init__(self, note: Callable[[int, int], object]) -> None:
        super().__init__()
        self._note = note

    def update(self, *, title: str | None = None, total: int | None = None, done: int | None = None) -> None:
        assert total is not None and done is not None
        self._note(total, done)


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4", "nested8", "nested4", "nested2"])
def test_an_expert_comes_back_as_it_was_encoded(checkpoint: Path, tmp_path: Path, precision: str) -> None:
    """Read from its record, every parameter is what its format makes of the checkpoint's, to the bit."""
    experts = mapped(checkpoint)
    index = converted(checkpoint, tmp_path)
    store = PrecisionStore(experts, [precision], "cpu", tmp_path, index)
    exact, source = CheckpointSlice(experts).open(), store.slices[0]
    reader = source.open()
    plain, slot = tiny.aligned(experts.slot_bytes), tiny.aligned(source.slot_bytes)
    for key in keys(experts):
        exact.read(key, plain)
        reader.read(key, slot)
        layer = experts.layer_of(key)
        weights = store.weights(key.layer, 0, [slot])
        assert set(weights) == {parameter.name for parameter in layer.parameters}
        for name, parameter in layer.views(plain).items():
            weight = weights[name]
            if isinstance(weight, torch.Tensor):
                assert tiny.same_bits(weight, parameter)
                continue
            assert isinstance(weight, StoredMatrix) and weight.level == precision
            matrix = parameter.t() if weight.shape.transposed else parameter
            form, n, k = weight.form, weight.shape.n, weight.shape.k
            stored = {field.name: form.encode(matrix)[field.name] for field in form.stored(n, k, precision)}
            x = torch.randn(3, k).to(torch.bfloat16)
            close = x.float() @ form.decode(stored, n, k, precision, torch.float32).t()
            torch.testing.assert_close(weight.linear(x).float(), close, rtol=3e-2, atol=3e-2 * float(close.abs().max()))
    reader.close()
    exact.close()


def test_records_are_aligned_and_levels_are_prefixes(checkpoint: Path) -> None:
    for layout in layouts_of(mapped(checkpoint), "nested"):
        assert len(layout.segments) == 4 and all(nbytes % BLOCK == 0 for nbytes in layout.segment_bytes)
        assert [layout.segments_of(level) for level in ("nested2", "nested3", "nested4", "nested8")] == [1, 2, 3, 4]


def test_slices_of_a_nested_format_make_up_its_levels(checkpoint: Path, tmp_path: Path) -> None:
    """Two slices, read and kept apart, give the bits that a single read of the level gives."""
    experts = mapped(checkpoint)
    index = converted(checkpoint, tmp_path, ("nested",))
    split = PrecisionStore(experts, parse_precisions("int8>int2"), "cpu", tmp_path, index)
    assert [precision.slices for precision in split.precisions] == [(0, 1), (0,)]
    assert [precision.name for precision in split.precisions] == ["int8", "int2"]
    key = ExpertKey(0, 1)
    slots = []
    for source in split.slices:
        slots.append(tiny.aligned(source.slot_bytes))
        source.open().read(key, slots[-1])
    x = torch.randn(2, 512).to(torch.bfloat16)
    for precision, level, used in ((0, "nested8", slots), (1, "nested2", slots[:1])):
        whole = PrecisionStore(experts, [level], "cpu", tmp_path, index)
        slot = tiny.aligned(whole.slices[0].slot_bytes)
        whole.slices[0].open().read(key, slot)
        apart, together = split.weights(0, precision, used), whole.weights(0, 0, [slot])
        for name, weight in together.items():
            other = apart[name]
            if isinstance(weight, StoredMatrix) and isinstance(other, StoredMatrix):
                k = weight.shape.k
                close = weight.linear(x[:, :k]), other.linear(x[:, :k])
                assert tiny.same_bits(*close)


def test_converting_again_changes_nothing_and_adds_formats(checkpoint: Path, tmp_path: Path) -> None:
    converted(checkpoint, tmp_path / "a", ("int8",))
    before = (tmp_path / "a" / "int8.experts").stat().st_mtime_ns
    converted(checkpoint, tmp_path / "a")
    assert (tmp_path / "a" / "int8.experts").stat().st_mtime_ns == before
    converted(checkpoint, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert set(contents(tmp_path / "a")) == {INDEX, *(f"{name}.experts" for name in NAMES)}
    assert sum(len(data) for name, data in contents(tmp_path / "a").items() if name != INDEX) == store_bytes(
        mapped(checkpoint), NAMES
    )


def test_a_conversion_that_stopped_goes_on(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often an error or Ctrl-C stops it, and even with a torn journal, the bytes come out the same."""
    converted(checkpoint, tmp_path / "whole")
    rng = random.Random(0)
    encode = converting.Encoder.encode
    written: list[int] = []
    stops = 0
    while stops < 100:
        left = [rng.randrange(1, 9)]

        def encodes_a_few(self: converting.Encoder, *args: object, left: list[int] = left) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return encode(self, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(converting.Encoder, "encode", encodes_a_few)
        written.clear()
        try:
            convert(
                tmp_path / "parts",
                origin(checkpoint),
                mapped(checkpoint),
                NAMES,
                bar=Begun(lambda total, done: written.append(done)),
            )
        except KeyboardInterrupt:
            for path in (tmp_path / "parts").glob("*.journal"):
                if rng.random() < 0.5:
                    with path.open("ab") as file:
                        file.write(b"\x01" * rng.randrange(1, 4))
            stops += 1
            continue
        break
    assert 2 <= stops < 100 and written[0] > 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_another_checkpoints_beginnings_are_not_continued(tmp_path: Path) -> None:
    first = tiny.save(tmp_path / "first", "mixtral", torch.bfloat16)
    parts = tmp_path / "parts"
    converted(first, parts, ("int8",))
    (parts / INDEX).unlink()
    (parts / "int8.experts").rename(parts / "int8.experts.part")
    (parts / "int8.journal").write_text(json.dumps({"origin": {}, "segments": []}) + "\n")
    converted(first, tmp_path / "whole", ("int8",))
    converted(first, parts, ("int8",))
    assert contents(parts) == contents(tmp_path / "whole")


_KILLED = """
import sys
sys.path.insert(0, {tests!r})
import warnings
from pathlib import Path
from offload.options import PlanOptions
from offload.plan.conversion import convert_model
print("ready", flush=True)
convert_model(Path({model!r}), PlanOptions(experts="int8,nf4,int8>int4>int2", expert_store=Path({output!r})))
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform == "win32", reason="kills with SIGKILL")
def test_conversion_killed_at_random_moments(tmp_path: Path) -> None:
    """Twenty SIGKILLs at random moments; then it ends with the same bytes as one that was left alone."""
    model = tiny.save(
        tmp_path / "model", "mixtral", torch.bfloat16, hidden_size=256, intermediate_size=512, num_local_experts=32
    )
    script = _KILLED.format(tests=str(Path(__file__).parent), model=str(model), output=str(tmp_path / "killed"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    rng = random.Random(5)
    kills = 0
    while kills < 20:
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.0, 0.3))
        running = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        kills += 1
        if not running:
            for path in (tmp_path / "killed").iterdir():  # it got to the end: once more from the start
                path.unlink()
    converted(model, tmp_path / "killed", ("int8", "nf4", "nested"))
    converted(model, tmp_path / "whole", ("int8", "nf4", "nested"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_room_is_looked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.save(tmp_path / "model", "mixtral", torch.bfloat16)
    with pytest.raises(BudgetError, match="run `offload convert` first"):
        convert(tmp_path / "store", origin(model), mapped(model), ["int8"], memory_bytes=1000)
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr(converting.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(DiskSpaceError, match=r"need .* more, 9\.8 KiB are free"):
        converted(model, tmp_path / "store", ("int8",))
    assert not list((tmp_path / "store").glob("*.experts"))


def test_a_disk_that_fills_up_is_told_by_the_folders_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    model = tiny.save(tmp_path / "model", "mixtral", torch.bfloat16)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(DiskSpaceError, match="store cannot be written: no space left on device: make room"):
            converted(model, tmp_path / "store", ("int8",))
    assert set(converted(model, tmp_path / "store", ("int8",)).formats) == {"int8"}


def test_a_conversion_that_stopped_before_the_index_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All records were there, under their names, and only the index was not."""
    checkpoint = tiny.save(tmp_path / "model", "mixtral", torch.bfloat16)
    with monkeypatch.context() as patch:

        def stop(self: StoreIndex, folder: Path) -> None:
            raise KeyboardInterrupt

        patch.setattr(StoreIndex, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            converted(checkpoint, tmp_path / "parts", ("int8", "nf4"))
    begun: list[tuple[int, int]] = []
    convert(
        tmp_path / "parts",
        origin(checkpoint),
        mapped(checkpoint),
        ("int8", "nf4"),
        bar=Begun(lambda total, done: begun.append((total, done))),
    )
    assert begun and all(total == done for total, done in begun)
    converted(checkpoint, tmp_path / "whole", ("int8", "nf4"))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_records_are_on_the_disk_before_the_index_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a power cut leaves, an index that is there is whole, and so are the files that it names."""
    checkpoint, store = tiny.save(tmp_path / "model", "mixtral", torch.bfloat16), tmp_path / "store"
    order: list[tuple[str, int]] = []
    fsync, replace = os.fsync, Path.replace

    def flushed(descriptor: int) -> None:
        order.append(("flushed", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def named(self: Path, target: Path) -> Path:
        order.append(("named", self.stat().st_ino))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", named)
    converted(checkpoint, store, ("int8", "nf4"))
    folder, index = store.stat().st_ino, (store / INDEX).stat().st_ino
    expected = []
    for file in ((store / f"{name}.experts").stat().st_ino for name in ("int8", "nf4")):
        expected += [("flushed", file), ("named", file), ("flushed", folder)]
    assert order == [*expected, ("flushed", index), ("named", index), ("flushed", folder)]


def test_converting_by_name_takes_no_more_memory_than_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from offload.plan import conversion

    checkpoint = tiny.save(tmp_path / "model", "mixtral", torch.bfloat16)
    monkeypatch.setattr(conversion.memory, "available_bytes", lambda: 1000)
    with pytest.raises(BudgetError, match="converting an expert takes"):
        conversion.convert_model(checkpoint, PlanOptions(experts="nf4", expert_store=tmp_path / "store"))
