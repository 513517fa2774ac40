"""A profile has every figure, in an order that makes sense, and leaves nothing behind. No figure has a limit."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny import one_thread

from cache.errors import ProfileError
from cache.types import Tier
from offload.costs.machine import Curve, MachineProfile
from offload.costs.model import CostModel
from offload.device.base import CpuDevice
from offload.device.emulated import EmulatedDevice
from offload.machine import measure as profile_module
from offload.machine.budget import Budget
from offload.machine.compute import ComputeProbe, ExpertModule, last_cache_bytes, weight_block
from offload.machine.extent import Extent
from offload.machine.measure import Stopped, measure_machine
from offload.machine.memory import measure_link
from offload.machine.threads import torch_threads
from offload.system import quiet
from offload.system.paths import machine_profile_path
from offload.terminal import main as cli

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
    profile = measure_machine(disk, EmulatedDevice(LINK_BYTES_PER_S), 1, LITTLE, steps.append, limit_s=900)
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
            (format, shape)
            for format in ("bf16", "nf4", "int8", "int4", "fp32", "int2", "int3")
            for shape in LITTLE.experts
        ]
        assert compute.experts[0].weight_bytes == 3 * 64 * 32 * 2
        assert [curve.format for curve in compute.dense] == ["bf16", "nf4", "int8", "fp32"]
        assert all(curve.seconds.at == tuple(LITTLE.experts[curve.shape]) for curve in compute.experts)
        assert all(rises(curve.seconds) for curve in (*compute.experts, *compute.dense))
        size = {curve.format: curve.weight_bytes for curve in compute.experts if curve.shape == (128, 64)}
        assert size["fp32"] > size["bf16"] > size["int8"] > size["int4"] > size["int3"] > size["int2"]
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
    assert len(set(measured.steps)) == 8
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
    monkeypatch.setattr(Budget, "median_s", lambda self, action, most_s: 1.0)
    with pytest.raises(ProfileError, match="too busy"):
        measure_link(EmulatedDevice(LINK_BYTES_PER_S), (2**10, 2**12), lambda: None, Budget(9.0))


def test_a_link_is_measured_beside_a_thread_that_computes() -> None:
    computed = list[str]()
    link = measure_link(
        EmulatedDevice(1e9), (2**10, 2**20), lambda: computed.append(threading.current_thread().name), Budget(9.0)
    )
    assert link.pinned.bytes_per_s > 0
    assert threading.current_thread().name not in computed
    assert len(computed) > 1
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("offload")]


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
    assert torch.equal(ExpertModule()._apply_gate(gate_up), expected)
    assert last_cache_bytes() > 0


def test_so_many_threads_compute_for_a_while() -> None:
    with torch_threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], measured: Measured
) -> Callable[..., Run]:
    """The command without its minute: it is given what was measured above."""
    asked: list[Any] = []

    def run(*arguments: str, measured: MachineProfile | Stopped = measured.profile, code: int = 0) -> Run:
        def measure(*args: Any, **kwargs: Any) -> MachineProfile:
            asked.extend(args)
            kwargs["on_step"]("measuring")
            assert 25 <= kwargs["limit_s"] < 45
            if isinstance(measured, Stopped):
                raise measured
            return measured

        monkeypatch.setattr(profile_module, "measure_machine", measure)
        with pytest.raises(SystemExit) as exited:
            cli.main(["profile", *arguments])
        assert exited.value.code == code
        shown = capsys.readouterr()
        return Run(asked, shown.out, shown.err)

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
    out, disk = tmp_path / "p.json", tmp_path / "models"
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


@pytest.mark.parametrize("busy", ["other programs used 1.4 cores meanwhile", None])
def test_a_busy_machine_is_said_so_and_stored(run: Callable[..., Run], measured: Measured, busy: str | None) -> None:
    result = run("--device", "cpu", measured=replace(measured.profile, busy=busy))
    assert ("1.4 cores meanwhile: the times are those of a busy machine" in result.err) == (busy is not None)
    assert MachineProfile.read(machine_profile_path()).busy == busy


def test_each_part_is_a_line_where_standard_error_is_no_terminal(run: Callable[..., Run]) -> None:
    assert run("--device", "cpu").err.splitlines()[:2] == ["offload: starting", "offload: measuring"]


def test_a_stopped_profile_is_stored_where_it_is_usable(run: Callable[..., Run], measured: Measured) -> None:
    stopped = Stopped("reading from disk", None)
    result = run("--device", "cpu", "--json", measured=stopped, code=130)
    assert "stopped while reading from disk: too little was measured to be stored" in result.err
    assert not machine_profile_path().exists() and result.out == ""
    stopped = Stopped("computing", replace(measured.profile, busy=None))
    result = run("--device", "cpu", "--json", measured=stopped, code=130)
    assert f"until then is stored in {machine_profile_path()}, the rest is estimated or missing" in result.err
    assert MachineProfile.read(machine_profile_path()) == stopped.profile and result.out == ""


def test_a_stopped_profile_takes_no_whole_ones_place(run: Callable[..., Run], measured: Measured) -> None:
    machine_profile_path().parent.mkdir(parents=True)
    measured.profile.write(machine_profile_path())
    result = run("--device", "cpu", measured=Stopped("computing", replace(measured.profile, busy="busy")), code=130)
    assert f"stopped while computing: the profile in {machine_profile_path()} stays as it was" in result.err
    assert MachineProfile.read(machine_profile_path()) == measured.profile
