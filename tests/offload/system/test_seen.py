"""Files that change after they were looked at: which changes count, and which do not."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cache.errors import TransferError
from offload.system import seen as module
from offload.system.seen import SeenFile

CONTENT = bytes(range(256)) * 1000
OTHER = bytes(reversed(CONTENT))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "weights"
    file.write_bytes(CONTENT)
    os.utime(file, ns=(10**18, 10**18))
    return file


@pytest.fixture(params=["plain", "direct"])
def opened(file: Path, request: pytest.FixtureRequest) -> Iterator[int]:
    """A descriptor that was open before the change."""
    flags = os.O_RDONLY
    if request.param == "direct":
        flags |= getattr(os, "O_DIRECT", 0)
    try:
        descriptor = os.open(file, flags)
    except OSError:
        pytest.skip("this file system has no direct reads")
    yield descriptor
    os.close(descriptor)


def overwrite(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.write(OTHER)


def in_secret(file: Path) -> None:
    before = file.stat()
    overwrite(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # some systems' clocks tick slowly
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(file: Path) -> None:
    new = file.with_name("new")
    new.write_bytes(OTHER)
    os.utime(new, ns=(10**18, 10**18))
    new.replace(file)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "overwritten": (overwrite, "time of modification"),
    "cut and refilled": (lambda file: file.write_bytes(OTHER), "time of modification"),
    "cut": (lambda file: os.truncate(file, 1000), "size"),
    "touched": (os.utime, "time of modification"),
    "overwritten, its time put back": (in_secret, "content"),
}
HARMLESS: dict[str, Callable[[Path], object]] = {
    "permissions": lambda file: file.chmod(0o600),
    "a link more": lambda file: file.with_name("link").hardlink_to(file),
    "renamed": lambda file: file.rename(file.with_name("renamed")),
    "deleted": lambda file: file.unlink(),
    "replaced, the old one open": replace,
    "the same time again": lambda file: os.utime(file, ns=(10**18, 10**18)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_an_error(file: Path, opened: int, change: str) -> None:
    seen = SeenFile(file)
    seen.sample()
    seen.check(opened)
    act, what = CHANGES[change]
    act(file)
    for _ in range(2):
        with pytest.raises(TransferError, match=rf"weights was changed while .* \(its {what} differs\): start again"):
            seen.check(opened)


@pytest.mark.parametrize("change", HARMLESS)
def test_what_leaves_the_bytes_alone_is_none(file: Path, opened: int, change: str) -> None:
    seen = SeenFile(file)
    before = seen.sample()
    HARMLESS[change](file)
    seen.check(opened)
    seen.check(opened)
    assert seen.sample() == before


@pytest.mark.parametrize("change", HARMLESS)
def test_a_change_after_a_harmless_one_counts(file: Path, opened: int, change: str) -> None:
    seen = SeenFile(file)
    seen.sample()
    (linked := file.with_name("linked")).hardlink_to(file)
    HARMLESS[change](file)
    seen.check(opened)
    overwrite(linked)
    with pytest.raises(TransferError, match="time of modification differs"):
        seen.check(opened)


def test_another_number_of_the_same_file_does_not_matter(
    file: Path, opened: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems number a file anew when it is opened again: the samples say that it is the same."""
    seen, plain, read = SeenFile(file), module._state, module._sample
    seen.sample()
    samples: list[int] = []

    def counted(descriptor: int, size: int) -> int:
        samples.append(read(descriptor, size))
        return samples[-1]

    monkeypatch.setattr(module, "_sample", counted)
    for number in (1, 0, 1, 0):
        monkeypatch.setattr(
            module, "_state", lambda stat, n=number: (plain(stat)[0], plain(stat)[1] + n, *plain(stat)[2:])
        )
        seen.check(opened)
    assert samples == [seen.sample()]  # once for each number
    overwrite(file)
    with pytest.raises(TransferError, match="time of modification differs"):
        seen.check(opened)


def test_a_file_put_in_its_place_is_another(file: Path) -> None:
    seen = SeenFile(file)
    seen.sample()
    replace(file)
    with file.open("rb") as stream, pytest.raises(TransferError, match=r"its (inode|device) differs"):
        seen.check(stream.fileno())


def test_a_link_leads_to_the_file_behind_it(file: Path, tmp_path: Path) -> None:
    """As the hub's cache has them: the link's own times do not matter, where it leads does."""
    link = tmp_path / "link"
    link.symlink_to(file)
    seen = SeenFile(link)
    seen.sample()
    link.unlink()
    link.symlink_to(file)
    with link.open("rb") as stream:
        seen.check(stream.fileno())
    link.unlink()
    link.symlink_to(tmp_path / "other")
    link.write_bytes(CONTENT)
    with link.open("rb") as stream, pytest.raises(TransferError, match="its inode differs"):
        seen.check(stream.fileno())


def test_without_a_sample_no_change_is_harmless(file: Path, opened: int) -> None:
    """Nobody knows then what the bytes were."""
    seen, before = SeenFile(file), file.stat()
    while file.stat().st_ctime_ns == before.st_ctime_ns:
        file.chmod(0o600)
    with pytest.raises(TransferError, match="time of change differs"):
        seen.check(opened)
    with pytest.raises(TransferError, match="time of change differs"):
        seen.sample()


@pytest.mark.parametrize("parts", [16, 32])
def test_a_sample_differs_where_any_large_part_does(file: Path, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixteenth of a small file, wherever it is; and of a large one a part of stated size."""
    step = len(CONTENT) // parts
    if parts > 16:
        monkeypatch.setattr(module, "_BLOCK_EVERY", step)
    found = {SeenFile(file).sample()}
    for start in range(0, len(CONTENT), step):
        file.write_bytes(CONTENT[:start] + bytes(step) + CONTENT[start + step :])
        found.add(SeenFile(file).sample())
    assert len(found) == 1 + len(range(0, len(CONTENT), step))


def test_a_sample_has_the_first_byte(file: Path) -> None:
    """The header, which a few bytes may change."""
    before = SeenFile(file).sample()
    file.write_bytes(b"x" + CONTENT[1:])
    assert SeenFile(file).sample() != before


def test_a_change_while_samples_are_compared_counts(file: Path, opened: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, read = SeenFile(file), module._sample
    seen.sample()

    def overtaken(descriptor: int, size: int) -> int:
        found = read(descriptor, size)
        overwrite(file)
        return found

    file.chmod(0o600)
    monkeypatch.setattr(module, "_sample", overtaken)
    with pytest.raises(TransferError, match="content differs"):
        seen.check(opened)


def test_a_file_that_is_gone(file: Path) -> None:
    seen = SeenFile(file)
    file.unlink()
    with pytest.raises(TransferError, match=f"reading {file} failed: No such file or directory"):
        seen.sample()


def test_ones_own_change_is_none_for_whoever_reads_meanwhile(file: Path, opened: int) -> None:
    seen = SeenFile(file)
    seen.sample()
    errors: list[BaseException] = []

    def read() -> None:
        try:
            seen.check(opened)
        except TransferError as error:
            errors.append(error)

    with file.open("r+b") as stream, seen.changing(stream.fileno()):
        stream.write(OTHER)
        stream.flush()
        reader = threading.Thread(target=read)
        reader.start()
        reader.join(0.05)
        assert reader.is_alive()  # it waits: the change is not over
    reader.join()
    seen.check(opened)
    assert not errors
    file.chmod(0o600)
    seen.check(opened)  # the samples are the new ones
    overwrite(file)
    with pytest.raises(TransferError), file.open("r+b") as stream, seen.changing(stream.fileno()):
        pytest.fail("it was somebody else's before")
