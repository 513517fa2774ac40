"""The three kinds of device keep their promises: alignment, a link no faster than stated, cores given back."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch

from cache.errors import BudgetError, DeviceError
from cache.types import Tier
from offload.device.base import CpuDevice, Device
from offload.device.choose import make_device
from offload.device.emulated import EmulatedDevice, _memcpy_bytes_per_s

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)

two_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores to choose from"
)


@pytest.fixture
def fast_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that copies 8 GB/s."""
    monkeypatch.setattr("offload.device.emulated._memcpy_bytes_per_s", lambda: 8e9)


@pytest.mark.parametrize("device", [CpuDevice(), EmulatedDevice(1e9)], ids=["cpu", "emulated"])
@pytest.mark.parametrize(("count", "nbytes"), [(3, 64), (5, 4160), (2, 3 * 2**20 + 64), (0, 64)])
def test_slots_are_aligned_apart_and_writable(device: Device, count: int, nbytes: int) -> None:
    for slots in (device.allocate(count, nbytes), device.host_slots(count, nbytes)):
        assert len(slots) == count
        for i, slot in enumerate(slots):
            assert slot.shape == (nbytes,) and slot.dtype == torch.uint8 and slot.data_ptr() % 64 == 0
            slot.fill_(i + 1)
        assert all((slot == i + 1).all() for i, slot in enumerate(slots))


def test_slots_stay_while_they_are_used() -> None:
    slot = CpuDevice().allocate(4, 2**20)[2]  # the others and the device are gone
    slot.fill_(7)
    CpuDevice().allocate(8, 2**20)[0].fill_(9)
    assert (slot == 7).all()


@pytest.mark.parametrize(("nbytes", "rate"), [(2**20, 50e6), (64, 10e3), (2**22, 1e12)])
def test_the_emulated_link_is_no_faster_than_stated(nbytes: int, rate: float) -> None:
    device = EmulatedDevice(rate)
    source, destination = torch.randint(0, 255, (nbytes,), dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    start = time.perf_counter()
    device.copy(destination, source, device.fence())
    assert time.perf_counter() - start >= nbytes / rate
    assert torch.equal(source, destination)


def test_a_cpu_has_no_link_and_no_memory_of_its_own() -> None:
    device = CpuDevice()
    assert (device.tier, device.memory_bytes(), device.peak_bytes(), device.is_accelerator) == (
        Tier.CPU, None, None, False
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="no link"):
        device.copy(torch.zeros(1), torch.zeros(1), None)


@two_cores
def test_the_emulated_accelerator_computes_on_a_core_of_its_own() -> None:
    before = os.sched_getaffinity(0)
    device = EmulatedDevice(1e9)
    seen: list[set[int]] = []

    def work() -> None:
        device.start_worker()
        seen.append(os.sched_getaffinity(0))

    with device.computing():
        mine = os.sched_getaffinity(0)
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
    assert len(mine) == 1 and seen == [before - mine]
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ZeroDivisionError), device.computing():
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == before


def test_one_core_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.device.emulated._usable_cores", lambda: [0])
    device = EmulatedDevice(1e9)
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    device.start_worker()
    with device.computing():
        if before is not None:
            assert os.sched_getaffinity(0) == before


def test_devices_by_name(fast_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert make_device("auto").name == make_device("cpu").name == "cpu"
    emulated = make_device("emulated")
    assert isinstance(emulated, EmulatedDevice) and emulated.tier is Tier.GPU and emulated.is_accelerator
    assert emulated.link_bytes_per_s == 3e9
    for link in ("2GB/s", 2e9):
        emulated = make_device("emulated", link)
        assert isinstance(emulated, EmulatedDevice) and emulated.link_bytes_per_s == 2e9


def test_a_link_that_cannot_be_emulated_honestly_is_refused(fast_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    make_device("emulated", 4e9)
    with pytest.raises(DeviceError, match=r"5GB/s.*copies memory at 7.45 GiB/s.*3.73 GiB/s"):
        make_device("emulated", "5GB/s")
    monkeypatch.setattr("offload.device.emulated._memcpy_bytes_per_s", lambda: 1e9)
    slow = make_device("emulated")
    assert isinstance(slow, EmulatedDevice) and slow.link_bytes_per_s == 5e8


def test_the_measured_memcpy_is_plausible() -> None:
    device = make_device("emulated")
    assert isinstance(device, EmulatedDevice) and 1e7 < device.link_bytes_per_s <= 3e9


def test_a_busy_machine_measures_the_memcpy_of_an_idle_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler takes the core away for a long while after every few units of time."""
    now = 0

    def clock() -> int:
        nonlocal now
        now += 1000 if now % 9 == 0 else 1
        return now

    monkeypatch.setattr("offload.device.emulated.time.perf_counter", clock)
    assert _memcpy_bytes_per_s(nbytes=64 * 4096, part=4096) == 4096


@pytest.mark.parametrize("junk", ["gpu", "cpu:0", "emulated:1", "cuda:", "cuda:x", "cuda:-1", "", "mps"])
def test_junk_is_no_device(junk: str) -> None:
    if junk == "cuda:" and torch.cuda.is_available():
        pytest.skip("with a GPU, an empty number is the first one")
    with pytest.raises(DeviceError):
        make_device(junk)


def test_cuda_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:1"):
        with pytest.raises(DeviceError, match="no CUDA GPU is usable here: use --device cpu"):
            make_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match="this machine has 2 CUDA GPUs"):
        make_device("cuda:2")


@pytest.mark.parametrize("device", ["cpu", "auto", "cuda"])
def test_a_link_needs_the_emulated_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="--link states the speed of the emulated"):
        make_device(device, "1GB/s")


@pytest.mark.parametrize("link", ["fast", "3GB", "-1GB/s", "0/s", 0.0, float("nan")])
def test_a_link_without_a_speed(fast_memory: None, link: str | float) -> None:
    with pytest.raises(BudgetError, match="link"):
        make_device("emulated", link)


# On hardware.


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_the_cache_changes_no_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Streaming every expert, caching a few, or holding all: the same logits and tokens, and close to the CPU's."""
    tiny.save(tmp_path, name, dtype)
    ids, outputs = tiny.ids(2, 12), []
    for cache in (10**9, 100_000, 1):
        with tiny.open_model(tmp_path, device="cuda", gpu_mem="2G", expert_cache=cache) as model:
            logits = model(input_ids=ids.cuda()).logits
            tokens = model.generate(ids.cuda(), max_new_tokens=32, min_new_tokens=32, do_sample=False)
            outputs.append((logits, tokens))
            stats = model.stats.as_dict()
            assert 0 < stats["peak_gpu_bytes"] <= 2 * 2**30 and stats["bytes_over_link"] > 0
            assert (stats["bypasses"] > 0) == (cache < 10**9)
    for logits, tokens in outputs[1:]:
        assert tiny.same_bits(logits, outputs[0][0]) and torch.equal(tokens, outputs[0][1])
    expected = tiny.resident(tmp_path, dtype)(input_ids=ids).logits
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(outputs[0][0].cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")
def test_on_cuda_bytes_cross_the_link_after_the_fence() -> None:
    device = make_device("cuda")
    (slot,), (host,) = device.allocate(1, 2**22), device.host_slots(1, 2**22)
    host.fill_(3)
    slot.fill_(1)
    read = slot.sum(dtype=torch.int64)
    device.copy(slot, host, device.fence())
    assert int(read) == 2**22 and bool((slot == 3).all())
    device.close()
