"""Memory cgroups of both versions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cache.errors import DeviceError
from scripts.bench import cgroup
from tests.scripts.small import needs_cgroup


@needs_cgroup
def test_a_command_runs_inside_its_cgroup_and_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; block = bytearray(50 << 20); sys.exit(7)"
    with cgroup.MemoryCgroup(200 << 20) as group:
        done = subprocess.run(group.command([sys.executable, "-c", code]))
        usage = group.usage()
        path = group.path
    assert done.returncode == 7
    assert 50 << 20 <= usage.peak_bytes <= 200 << 20
    assert usage.limit_bytes == 200 << 20
    assert usage.oom_kills == 0
    assert not path.exists()


@needs_cgroup
def test_a_command_that_needs_more_is_killed(capfd: pytest.CaptureFixture[str]) -> None:
    command = ["--memory", "60M", "--", sys.executable, "-c", "block = bytearray(500 << 20)"]
    assert cgroup.main(command) == 137
    assert "killed for memory" in capfd.readouterr().err


def hierarchy(tmp_path: Path, mounts: str, proc: str) -> dict[str, Path]:
    (tmp_path / "mounts").write_text(mounts)
    (tmp_path / "cgroup").write_text(proc)
    return {"mounts": tmp_path / "mounts", "proc": tmp_path / "cgroup"}


def test_version_2_uses_the_nearest_ancestor_that_hands_memory_on(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    (root / "user" / "session").mkdir(parents=True)
    (root / "cgroup.subtree_control").write_text("cpu memory pids")
    (root / "user" / "cgroup.subtree_control").write_text("cpu memory")
    (root / "user" / "session" / "cgroup.subtree_control").write_text("")
    files = hierarchy(tmp_path, f"cgroup2 {root} cgroup2 rw 0 0\n", "0::/user/session\n")
    assert cgroup.MemoryCgroup(1 << 30, **files).path.parent == root / "user"


def test_version_1_uses_the_process_own_cgroup(tmp_path: Path) -> None:
    root = tmp_path / "memory"
    (root / "mine").mkdir(parents=True)
    mounts = f"cgroup2 /u cgroup2 rw 0 0\ncgroup {root} cgroup rw,memory 0 0\n"
    files = hierarchy(tmp_path, mounts, "4:memory:/mine\n0::/\n")
    assert cgroup.MemoryCgroup(1 << 30, **files).path.parent == root / "mine"


def test_without_memory_cgroups_the_message_says_so(tmp_path: Path) -> None:
    files = hierarchy(tmp_path, "proc /proc proc rw 0 0\n", "0::/\n")
    with pytest.raises(DeviceError, match="no mounted hierarchy offers the memory controller"):
        cgroup.MemoryCgroup(1 << 30, **files)
