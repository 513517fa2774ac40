"""The cache folder and the lock that one process at a time holds."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cache.errors import OffloadError
from offload.system.paths import cache_dir, exclusive

HOLDER = """
import sys
from pathlib import Path
from offload.system.paths import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""
WAITER = """
import signal, sys
from pathlib import Path
from offload.system.paths import exclusive
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
try:
    with exclusive(Path(sys.argv[1]), lambda: print("waiting", flush=True)):
        print("held", flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def start(program: str, lock: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, str(lock)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.skipif(sys.platform != "linux", reason="each system keeps caches elsewhere")
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("OFFLOAD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "offload"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_dir() == tmp_path / ".cache" / "offload"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "offload"
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
    monkeypatch.setenv("OFFLOAD_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "mine"
    assert not list(tmp_path.iterdir())


def test_without_a_home_the_line_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_CACHE", "~nobody-is-called-this/x")
    with pytest.raises(OffloadError, match=r"no home folder .* \(~nobody-is-called-this/x\): set OFFLOAD_CACHE"):
        cache_dir()


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    lock = tmp_path / "below" / "lock"
    holder = start(HOLDER, lock)
    assert says(holder) == "held"
    with exclusive(lock, waiting=holder.kill):  # waiting for it is what ends it
        assert holder.wait() != 0
    holder.communicate()
    with exclusive(lock, waiting=lambda: pytest.fail("the lock was left behind")):
        pass
    assert lock.is_file()


def test_who_waits_says_so_once_and_can_be_interrupted(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with exclusive(lock):
        waiter = start(WAITER, lock)
        assert says(waiter) == "waiting"
        waiter.send_signal(signal.SIGINT)
        assert says(waiter) == "interrupted"
        waiter.communicate()
        another = start(WAITER, lock)
        assert says(another) == "waiting"
    assert says(another) == "held"
    another.communicate()


def test_threads_of_one_process_wait_for_each_other(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        with exclusive(tmp_path / "lock"):
            inside.append(1)
            most.append(len(inside))
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path / "lock"):
        raise ZeroDivisionError
    with exclusive(tmp_path / "lock", waiting=lambda: pytest.fail("it was not given back")):
        pass
