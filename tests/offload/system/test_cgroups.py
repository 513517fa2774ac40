"""Limits on memory: of this process's own control group, of every group above it, in both versions of the interface."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from offload.system import cgroups, memory
from scripts.bench.cgroup import MemoryCgroup
from tests.scripts.small import needs_cgroup

MIB = 2**20
UNLIMITED_V1 = str(2**63 - 4096)
MOUNTS = {
    2: "41 31 0:38 {top} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n",
    1: "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "35 31 0:32 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
}
PATHS = {2: "0::{path}\n", 1: "5:cpu,cpuacct:/elsewhere\n4:memory:{path}\n1:name=systemd:{path}\n0::/nowhere\n"}


class Tree:
    """A /proc and a /sys of this test's own: `path` is the process's group, `top` the one that is mounted."""

    def __init__(self, root: Path, version: int, path: str, top: str = "/") -> None:
        self.root, self.version = root, version
        self.process = root / "proc" / "self"
        self.process.mkdir(parents=True)
        (self.process / "cgroup").write_text(PATHS[version].format(path=path))
        (self.process / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/a b\n" + MOUNTS[version].format(top=top))

    def group(self, path: str, limit: str, used: int, cache: int = 0, mapped: int = 0, high: str = "max") -> None:
        """A group of which `used` bytes are taken, `cache` of them page cache and `mapped` of that in use."""
        below = "memory" if self.version == 1 else ""
        folder = self.root / "sys/fs/cgroup" / below / path
        folder.mkdir(parents=True, exist_ok=True)
        if self.version == 2:
            files = {"memory.max": limit, "memory.high": high, "memory.current": str(used)}
            stat = f"anon 1\ninactive_file {cache // 2}\nactive_file {cache // 2}\nfile_mapped {mapped}\n"
        else:
            files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": str(used)}
            stat = (
                f"mapped_file 0\ninactive_file 0\nhierarchical_memory_limit {limit}\n"
                f"total_mapped_file {mapped}\ntotal_inactive_file {cache // 2}\ntotal_active_file {cache // 2}\n"
            )
        for name, value in (files | {"memory.stat": stat}).items():
            (folder / name).write_text(f"{value}\n")

    def free(self, resident: int = 1) -> int | None:
        return cgroups.free_bytes(resident, self.process, self.root)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("limited", ["user.slice/job/step", "user.slice/job", "user.slice", "."])
def test_a_limit_at_any_level_counts(tmp_path: Path, version: int, limited: str) -> None:
    tree = Tree(tmp_path, version, "/user.slice/job/step")
    for level in (".", "user.slice", "user.slice/job", "user.slice/job/step"):
        free = "max" if version == 2 else UNLIMITED_V1
        tree.group(level, str(300 * MIB) if level == limited else free, used=100 * MIB)
    assert tree.free() == 200 * MIB


@pytest.mark.parametrize("version", [1, 2])
def test_the_least_that_a_level_has_left_counts_with_what_others_took_there(tmp_path: Path, version: int) -> None:
    tree = Tree(tmp_path, version, "/slice/job")
    tree.group("slice", str(1000 * MIB), used=900 * MIB)
    tree.group("slice/job", str(500 * MIB), used=100 * MIB)
    assert tree.free() == 100 * MIB


@pytest.mark.parametrize("version", [1, 2])
def test_a_group_with_a_space_in_its_name(tmp_path: Path, version: int) -> None:
    """Which the kernel writes in octal where it lists mounts."""
    tree = Tree(tmp_path, version, "/a slice/job", top=r"/a\040slice")
    tree.group("job", str(300 * MIB), used=100 * MIB)
    assert tree.free() == 200 * MIB


@pytest.mark.parametrize("version", [1, 2])
def test_page_cache_is_free_unless_it_is_in_use(tmp_path: Path, version: int) -> None:
    tree = Tree(tmp_path, version, "/job")
    tree.group("job", str(500 * MIB), used=490 * MIB, cache=400 * MIB, mapped=50 * MIB)
    assert tree.free() == (10 + 400 - 50) * MIB


@pytest.mark.parametrize("version", [1, 2])
def test_libraries_that_count_in_another_group_are_in_the_budget_all_the_same(tmp_path: Path, version: int) -> None:
    tree = Tree(tmp_path, version, "/job")
    tree.group("job", str(500 * MIB), used=100 * MIB)
    assert tree.free(resident=300 * MIB) == 200 * MIB


def test_a_limit_that_slows_down_counts_like_one_that_kills(tmp_path: Path) -> None:
    tree = Tree(tmp_path, 2, "/job")
    tree.group("job", str(500 * MIB), used=100 * MIB, high=str(400 * MIB))
    assert tree.free() == 300 * MIB


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("path", "top"), [("/docker/a1", "/docker/a1"), ("/docker/a1", "/kubepods/pod/b2"), ("/../../job", "/"), ("/", "/")]
)
def test_a_container_sees_its_own_group_alone(tmp_path: Path, version: int, path: str, top: str) -> None:
    tree = Tree(tmp_path / "inner", version, path, top)
    tree.group(".", str(300 * MIB), used=100 * MIB)
    assert tree.free() == 200 * MIB


@pytest.mark.parametrize("version", [1, 2])
def test_a_group_that_has_more_than_its_limit_has_nothing_left(tmp_path: Path, version: int) -> None:
    tree = Tree(tmp_path, version, "/job")
    tree.group("job", str(100 * MIB), used=120 * MIB)
    assert tree.free() == 0


def test_without_limits_and_without_control_groups_there_is_none(tmp_path: Path) -> None:
    tree = Tree(tmp_path, 2, "/job")
    tree.group("job", "max", used=100 * MIB)
    assert tree.free() is None
    assert cgroups.free_bytes(1, tmp_path / "nothing", tmp_path) is None


def test_what_is_free_is_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "free_bytes", lambda resident: 3 * MIB)
    assert memory.available_bytes() == 3 * MIB
    monkeypatch.setattr(cgroups, "free_bytes", lambda resident: 2**62)
    assert 3 * MIB < memory.available_bytes() < 2**62


@needs_cgroup
def test_the_kernels_own_limit_is_seen_from_a_group_below_it() -> None:
    program = "from offload.system.memory import available_bytes; print(available_bytes())"
    with MemoryCgroup(400 * MIB) as group:
        inner = group.path / "inner"
        inner.mkdir()
        try:
            enter = ["/bin/sh", "-c", 'echo $$ >"$0" && exec "$@"', str(inner / "cgroup.procs")]
            run = subprocess.run(
                [*enter, sys.executable, "-c", program],
                capture_output=True,
                text=True,
                check=True,
                cwd=Path(__file__).parents[3],
            )
        finally:
            inner.rmdir()
    assert 200 * MIB < int(run.stdout) < 400 * MIB
