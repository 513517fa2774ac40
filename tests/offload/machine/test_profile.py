"""A profile has every figure, in an order that makes sense, and leaves nothing behind. No figure has a limit."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny import one_thread

from cache.errors import DiskSpaceError, ProfileError, TransferError
from cache.types import Tier
from offload.costs.machine import Curve, MachineProfile
from offload.costs.model import CostModel
from offload.device.base import CpuDevice
from offload.device.emulated import EmulatedDevice
from offload.machine import measure as profile_module
from offload.machine import memory as probe_memory
from offload.machine.compute import ComputeProbe, expert_module, last_cache_bytes, weight_block
from offload.machine.disk import block_bytes_per_s, open_probe, slowdowns
from offload.machine.measure import Extent, measure_machine
from offload.machine.memory import measure_link
from offload.machine.threads import torch_threads
from offload.system import quiet
from offload.system.paths import machine_profile_path
from offload.system.timing import median_of, median_s, rising
from offload.terminal import main as cli
from offload.terminal.profile_tables import plot

LITTLE = Extent(
    file_bytes=2**23,
    record_bytes=(2**18, 2**20, 2**30),
    disk_blocks=(2**16, 2**18),
    experts={(64, 32): (1,), (128, 64): (1, 8)},
    dense_shape=(128, 64),
    dense_tokens=(1, 8),
    overhead_tokens=(1, 16),
    overhead_rounds=1,
    block_bytes=2**20,
    copy_bytes=(2**16, 2**22),
)
LINK_BYTES_PER_S = 1e8


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    yield from one_thread()


class Measured(NamedTuple):
    profile: MachineProfile
    steps: list[str]
    left_on_disk: list[Path]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """This machine with an emulated accelerator, in little."""
    disk, steps = tmp_path_factory.mktemp("disk"), list[str]()
    profile = measure_machine(disk, EmulatedDevice(LINK_BYTES_PER_S), 1, LITTLE, steps.append)
    return Measured(profile, steps, list(disk.iterdir()))


class Run(NamedTuple):
    asked: list[Any]
    out: str
    err: str


def rises(curve: Curve) -> bool:
    return all(a <= b for a, b in zip(curve.seconds, curve.seconds[1:], strict=False)) and min(curve.seconds) > 0


def test_every_figure_is_there(measured: Measured) -> None:
    profile = measured.profile
    assert profile.disk.alone.at == profile.disk.streamed.at == (2**18, 2**20)  # the third is larger than the file
    assert rises(profile.disk.alone)
    assert rises(profile.disk.streamed)
    assert [(block.block_bytes, block.threads) for block in profile.disk.blocks] == [
        (nbytes, threads) for nbytes in (2**16, 2**18) for threads in (1, 2, 4, 8)
    ]
    assert profile.host_read_bytes_per_s > 0
    assert profile.host_copy_bytes_per_s > 0
    assert profile.cpu_start_s > 0
    assert set(profile.packing_bytes_per_s) <= {"nf4", "int4"}
    assert profile.link_stated_bytes_per_s == LINK_BYTES_PER_S
    assert set(profile.compute) == {Tier.CPU, Tier.GPU}
    for compute in profile.compute.values():
        assert [(curve.format, curve.shape) for curve in compute.experts] == [
            (format, shape) for format in ("bf16", "fp32", "int8", "nf4", "int4", "int2") for shape in LITTLE.experts
        ]
        assert compute.experts[0].weight_bytes == 3 * 64 * 32 * 2
        assert [curve.format for curve in compute.dense] == ["bf16", "fp32", "int8", "nf4"]
        assert all(curve.seconds.at == tuple(LITTLE.experts[curve.shape]) for curve in compute.experts)
        assert all(rises(curve.seconds) for curve in (*compute.experts, *compute.dense))
        size = {curve.format: curve.weight_bytes for curve in compute.experts if curve.shape == (128, 64)}
        assert size["fp32"] > size["bf16"] > size["int8"] > size["int4"] > size["int2"]
        assert compute.layer_overhead.at == (1, 16)
    assert {"cpu", "cores", "disk", "torch"} <= set(profile.about)


def test_it_prices_a_model_and_survives_its_file(measured: Measured, tmp_path: Path) -> None:
    measured.profile.write(tmp_path / "machine.json")
    profile = MachineProfile.read(tmp_path / "machine.json")
    assert profile == measured.profile
    costs = CostModel(profile, expert_bytes=2**20, tier=Tier.GPU, dense_layer_bytes=2**20)
    assert 0 < costs.read_s(2**20) < costs.read_s(2**24)
    assert 0 < costs.expert_s(Tier.GPU, 1) <= costs.expert_s(Tier.GPU, 512)
    assert costs.layer_s(1, 8) > 0


def test_it_says_what_it_does_and_leaves_nothing_behind(measured: Measured) -> None:
    assert len(measured.steps) > 8
    assert measured.left_on_disk == []
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("offload")]
    assert torch.get_num_threads() == 1


def test_the_emulated_link_has_its_stated_speed(measured: Measured) -> None:
    link = measured.profile.link
    assert link is not None
    # It never delivers early; how late it is depends on what else the machine does.
    for alone, computing in ((link.pinned, link.pinned_computing), (link.pageable, link.pageable_computing)):
        assert computing(2**22) >= alone(2**22) >= 0.99 * 2**22 / LINK_BYTES_PER_S


def test_a_machine_too_busy_for_its_link_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_memory, "median_s", lambda action, budget_s: 1.0)
    with pytest.raises(ProfileError, match="too busy"):
        measure_link(EmulatedDevice(LINK_BYTES_PER_S), (2**10, 2**12), lambda: None)


def test_a_link_is_measured_beside_a_thread_that_computes() -> None:
    computed = list[str]()
    link = measure_link(EmulatedDevice(1e9), (2**10, 2**20), lambda: computed.append(threading.current_thread().name))
    assert link.pinned.bytes_per_s > 0
    assert threading.current_thread().name not in computed
    assert len(computed) > 1
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("offload")]


def test_blocks_are_read_by_as_many_threads_as_asked_and_failures_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "blocks"
    file.write_bytes(bytes(2**18))
    assert block_bytes_per_s(file, 2**16, 3, budget_s=0.0) > 0

    def fail(self: object, pieces: object, destination: object) -> int:
        raise TransferError("the disk is gone")

    monkeypatch.setattr("offload.store.files.FileReader.read", fail)
    with pytest.raises(TransferError, match="the disk is gone"):
        block_bytes_per_s(file, 2**16, 2, budget_s=0.0)


def test_a_plot_has_every_series_and_the_ends_of_both_axes() -> None:
    drawn = plot("title", {"a": [(1, 1.0), (512, 8.0)], "b": [(1, 2.0)]}, str, lambda y: f"{y:g} s")
    lines = drawn.splitlines()
    assert lines[0] == "title"
    assert lines[1].startswith("8 s")
    assert lines[1].endswith("●")
    assert lines[10].startswith("1 s │●")
    assert lines[12].split() == ["1", "512"]
    assert "● a" in lines[13]
    assert "○ b" in lines[13]
    assert plot("one", {"a": [(4, 3.0)]}, str, str).count("●") == 2  # the point, and what it is called


def test_records_are_what_was_written(tmp_path: Path) -> None:
    """The probe reads real bytes with the engine: as many landings as records, in time order."""
    with open_probe(tmp_path, 2**22, (2**18,)) as probe:
        landings = probe.read(2**18, 8)
        assert len(landings) == 8
        assert landings == sorted(landings)
        (file,) = tmp_path.glob("*/*")
        assert file.stat().st_size == 2**22 + 8
        file.write_bytes(b"")
        with pytest.raises(Exception, match=r"ends at byte \d+"):
            probe.read(2**18)
    assert list(tmp_path.iterdir()) == []


def test_slowdowns_are_factors_and_a_failing_read_is_raised(tmp_path: Path) -> None:
    with open_probe(tmp_path, 2**22, (2**18,)) as probe:
        assert min(slowdowns(probe, lambda: sum(range(1000)), 2**18)) >= 1
        (file,) = tmp_path.glob("*/*")
        broken = iter([None])

        def compute() -> None:
            if next(broken, 1) is not None:  # from the second call on
                file.write_bytes(b"")

        with pytest.raises(Exception, match="ends at byte"):
            slowdowns(probe, compute, 2**18)


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=100 * 2**20))
    with (
        pytest.raises(DiskSpaceError, match=r"512.0 MiB.*100.0 MiB: free some, or choose another --disk"),
        open_probe(tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_no_folder_to_write_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ProfileError, match="choose another --disk"), open_probe(tmp_path / "file" / "below"):
        pass


def test_the_expert_that_is_timed_is_the_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes other weights until all had their turn, and computes silu(gate) * up, down."""
    seen = []

    def compute(module: Any, hidden: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(weights["down_proj"].data_ptr())
        return hidden

    probe = ComputeProbe(CpuDevice(), 1, weight_block(CpuDevice(), 4 * 3 * 64 * 32 * 4))
    call = probe.expert_call("fp32", (64, 32))
    monkeypatch.setattr("offload.machine.compute.compute_expert", compute)
    for _ in range(5):
        call(2)
    assert len(set(seen[:4])) == 4
    assert seen[4] == seen[0]
    gate_up = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    expected = torch.nn.functional.silu(gate_up[:, :2]) * gate_up[:, 2:]
    assert torch.equal(expert_module()._apply_gate(gate_up), expected)
    assert last_cache_bytes() > 0


def test_times_without_what_cannot_be() -> None:
    assert rising({4: 1.0, 1: 2.0, 8: 3.0}) == Curve((1, 4, 8), (1.0, 1.0, 3.0))
    samples = iter([5.0, 1.0, 3.0])
    assert median_of(lambda: next(samples), budget_s=0.0) == 3.0
    calls = list[int]()
    assert median_s(lambda: calls.append(1), budget_s=0.0) >= 0
    assert len(calls) == 4
    with torch_threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], measured: Measured
) -> Callable[..., Run]:
    """The command without its minute: it is given what was measured above."""
    asked: list[Any] = []

    def measure(*args: Any, **kwargs: Any) -> MachineProfile:
        asked.extend(args)
        kwargs["on_step"]("measuring")
        return measured.profile

    def run(*arguments: str) -> Run:
        with pytest.raises(SystemExit) as exited:
            cli.main(["profile", *arguments])
        assert exited.value.code == 0
        shown = capsys.readouterr()
        return Run(asked, shown.out, shown.err)

    monkeypatch.setattr(profile_module, "measure_machine", measure)
    monkeypatch.setattr(quiet, "prepare", lambda: None)  # it sets up the whole process
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "cache"))
    return run


def test_the_command_stores_and_shows(run: Callable[..., Run], measured: Measured) -> None:
    result = run("--device", "emulated", "--link", "100MB/s", "--threads", "3")
    disk, device, threads = result.asked
    assert (disk, device.name, threads) == (machine_profile_path().parent, "emulated", 3)
    assert MachineProfile.read(machine_profile_path()) == measured.profile
    assert "1.0 MiB" in result.out
    assert "128 x 64" in result.out
    assert "gpu (emulated, threads: 1)" in result.out
    assert "link, pinned, CPU computing" in result.out
    assert "gpu: an expert of 128 x 64, ms by tokens" in result.out
    assert f"stored in {machine_profile_path()}" in result.err


def test_the_commands_json_is_the_profile(run: Callable[..., Run], tmp_path: Path, measured: Measured) -> None:
    out, disk = tmp_path / "other" / "p.json", tmp_path / "models"
    disk.mkdir()
    result = run("--device", "cpu", "--json", "--out", str(out), "--disk", str(disk))
    assert result.asked[0] == disk
    assert json.loads(result.out) == json.loads(json.dumps(measured.profile.as_dict()))
    assert MachineProfile.read(out) == measured.profile
    assert not machine_profile_path().exists()


def test_a_disk_that_is_not_there_is_refused(
    run: Callable[..., Run], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as exited:
        cli.main(["profile", "--disk", str(tmp_path / "typo")])
    assert exited.value.code == 2 and "there is no such folder" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(("busy", "said"), [(7.0, True), (0.1, False), (None, False)])
def test_a_busy_machine_is_said_so(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, busy: float | None, said: bool
) -> None:
    monkeypatch.setattr(profile_module, "busy_cores", lambda: busy)
    assert ("cores were busy" in run("--device", "cpu").err) is said
