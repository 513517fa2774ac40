"""Prices come from the profile as documented, and a damaged profile is refused, saying where."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import MB, expert, machine

from cache.errors import OffloadError, OutputError, ProfileError
from cache.types import Tier
from offload.costs.machine import Curve, MachineProfile
from offload.costs.model import CostModel, expert_curve


def model(**changes: Any) -> CostModel:
    """Experts of 10 MB on the test machine, beside 5 MB of dense weights a layer."""
    arguments: dict[str, Any] = {"expert_bytes": 10 * MB, "dense_layer_bytes": 5 * MB}
    return CostModel(machine(), **(arguments | changes))


def test_a_curve_meets_its_points_and_is_linear_between_them() -> None:
    curve = Curve((2, 4, 8), (1.0, 2.0, 3.0))
    assert [curve(size) for size in (2, 4, 8)] == [1.0, 2.0, 3.0]
    assert curve(3) == 1.5
    assert curve(1) == 1.0  # a smaller one takes no less
    assert curve(16) == 6.0  # a larger one goes at the last one's rate


@given(
    st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 1e3)), min_size=1, unique_by=lambda point: point[0]),
    st.integers(1, 2000),
)
def test_a_curve_of_rising_times_rises(points: list[tuple[int, float]], size: int) -> None:
    at = tuple(sorted(size for size, _ in points))
    curve = Curve(at, tuple(sorted(seconds for _, seconds in points)))
    assert curve(size) <= curve(size + 1) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("at", "seconds"), [((), ()), ((1, 2), (1.0,)), ((2, 1), (1.0, 1.0)), ((0,), (1.0,)), ((1,), (-1.0,))]
)
def test_a_curve_of_nonsense_is_refused(at: tuple[int, ...], seconds: tuple[float, ...]) -> None:
    with pytest.raises(ProfileError):
        Curve(at, seconds)


def test_reads_copies_and_slowdowns() -> None:
    costs = model()
    assert costs.read_s(10 * MB) == pytest.approx(10e-3)
    assert costs.read_s(10 * MB, alone=True) == pytest.approx(10.1e-3)
    assert costs.read_s(4 * MB) == pytest.approx(4e-3)
    assert costs.read_s(4 * MB, computing=True) == pytest.approx(5e-3)
    assert costs.link_s(10 * MB) == pytest.approx(6e-3)
    assert costs.link_s(10 * MB, computing=True) == pytest.approx(11e-3)
    assert costs.cpu_start_s == pytest.approx(50e-6)
    assert costs.expert_s(Tier.CPU, 1, reading=True) == pytest.approx(1.5e-3)


def test_experts_by_tier_tokens_and_bytes() -> None:
    assert model().expert_s(Tier.CPU, 1) == pytest.approx(1e-3)
    assert model().expert_s(Tier.CPU, 258) == pytest.approx(32.5e-3)
    assert model().expert_s(Tier.CPU, 1024) == pytest.approx(128e-3)
    assert model().expert_s(Tier.GPU, 1) == pytest.approx(0.1e-3)
    assert model(expert_bytes=6 * MB).expert_s(Tier.CPU, 1) == pytest.approx(0.6e-3)  # half way between two measured
    assert model(expert_bytes=MB).expert_s(Tier.CPU, 1) == pytest.approx(0.1e-3)  # half of the smallest
    assert model(expert_bytes=20 * MB).expert_s(Tier.CPU, 1) == pytest.approx(2e-3)  # twice the largest
    assert model(format="fp32", expert_bytes=10 * MB).expert_s(Tier.CPU, 512) == pytest.approx(64e-3)


def test_a_format_that_is_packed_is_packed_by_the_reader_of_the_expert() -> None:
    profile = machine()
    cpu = profile.compute[Tier.CPU]
    packed = replace(cpu.experts[0], format="nf4")
    profile = replace(profile, compute={Tier.CPU: replace(cpu, experts=(packed,))})
    options: dict[str, Any] = {"format": "nf4", "dense_format": "bf16", "dense_layer_bytes": 0}
    assert CostModel(profile, expert_bytes=10 * MB, **options).read_s(10 * MB) == pytest.approx(10e-3)
    costs = CostModel(profile, expert_bytes=10 * MB, packs=True, **options)
    assert costs.read_s(10 * MB, alone=True) == pytest.approx(10.1e-3 + 10e-3)
    assert costs.read_s(10 * MB) == pytest.approx((10.1e-3 + 10e-3) / 2)  # two readers take turns


def test_curves_of_as_many_threads_as_compute() -> None:
    one, two = replace(expert(10 * MB, {1: 3e-3}), threads=1), expert(10 * MB, {1: 2e-3})
    for threads, said in ((1, 3e-3), (2, 2e-3), (8, 2e-3), (None, 2e-3)):
        assert expert_curve([two, one], "bf16", 10 * MB, threads)(1) == said
    assert expert_curve([two], "bf16", 10 * MB, 1)(1) == 2e-3  # what there is


def test_shapes_measured_at_different_tokens_are_joined() -> None:
    curve = expert_curve([expert(10, {1: 1.0, 4: 4.0}), expert(20, {1: 2.0, 2: 4.0, 4: 8.0})], "bf16", 15)
    assert curve == Curve((1, 2, 4), (1.5, 3.0, 6.0))


def test_a_layer_and_a_pass() -> None:
    costs = model(dense_pass_bytes=100 * MB)
    assert costs.layer_s(1) == pytest.approx(0.5e-3 + 100e-6)
    assert costs.layer_s(1, experts=8) == pytest.approx(0.5e-3 + 100e-6 + 80e-6)
    assert costs.layer_s(512, experts=8) == pytest.approx(16e-3 + 2e-3 + 80e-6)
    assert costs.pass_s() == pytest.approx(0.5e-3 + 10e-3)
    assert model(tier=Tier.GPU).layer_s(1, experts=8) == pytest.approx(0.05e-3 + 50e-6 + 160e-6)


def test_a_dense_layer_measured_at_one_token_grows_with_tokens_like_the_machine() -> None:
    costs = model(dense_layer_bytes=None, dense_layer_s=2e-3)
    assert costs.layer_s(1) == pytest.approx(2e-3 + 100e-6)
    assert costs.layer_s(512) == pytest.approx(64e-3 + 2e-3)


def test_the_dense_part_is_given_once() -> None:
    for given_twice in ({"dense_layer_s": 1e-3}, {"dense_layer_bytes": None}):
        with pytest.raises(ValueError, match="one of the two"):
            model(**given_twice)
    with pytest.raises(ValueError, match="not negative"):
        model(dense_layer_bytes=-1)


def test_what_was_not_measured_is_refused_by_name() -> None:
    with pytest.raises(ProfileError, match='no measurement of "nf4" weights, only of bf16, fp32'):
        model(format="nf4")
    without = CostModel(machine(with_accelerator=False), expert_bytes=MB, dense_layer_bytes=0)
    with pytest.raises(ProfileError, match="no accelerator's link"):
        without.link_s(MB)
    with pytest.raises(ProfileError, match="has the cpu and not the gpu"):
        without.expert_s(Tier.GPU, 1)
    with pytest.raises(ProfileError, match='"fp32"'):
        model(format="fp32").expert_s(Tier.GPU, 1)


@pytest.mark.parametrize("with_accelerator", [True, False])
def test_a_profile_survives_its_file(tmp_path: Path, with_accelerator: bool) -> None:
    profile, path = machine(with_accelerator), tmp_path / "machine.json"
    profile.write(path)
    assert MachineProfile.read(path) == profile
    profile.write(path)  # over the old one
    assert [file.name for file in path.parent.iterdir()] == ["machine.json"]


def damaged(*path: str | int, value: Any) -> dict[str, Any]:
    """A profile's JSON with one value replaced, or taken out where `value` is ..."""
    whole: Any = json.loads(json.dumps(machine().as_dict()))
    inner = whole
    for step in path[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return dict(whole)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (damaged("format", value="x"), "is not a machine profile"),
        ([], "is not a machine profile"),
        (damaged("version", value=2), "version 2, this program reads version 3: measure again"),
        (damaged("disk", value=...), "disk is missing"),
        (damaged("disk", "alone", "at", 1, value="x"), r'disk.alone.at\[1\] is "x", where JSON\'s integer'),
        (damaged("disk", "alone", "seconds", value=[1.0]), "disk.alone: a curve of 2 sizes and 1 times"),
        (damaged("disk", "streamed", "at", value=[2, 1]), "not ascending"),
        (damaged("disk", "readers", value=True), "disk.readers is true"),
        (damaged("link", "pinned", "bytes_per_s", value=0), "link.pinned: bytes_per_s: 0.0 is not a positive number"),
        (damaged("compute", value={}), "at least one of them"),
        (damaged("compute", "tpu", value={}), '"tpu" is not a tier'),
        (damaged("compute", "gpu", "threads", value=...), "compute.gpu.threads is missing"),
        (damaged("compute", "cpu", "experts", value=[]), "compute.cpu: no measurement of experts"),
        (damaged("compute", "cpu", "experts", 1, "shape", value=[1]), r"compute.cpu.experts\[1\].shape has 1 entries"),
        (damaged("compute", "cpu", "reading_slowdown", value=0.5), "factor of at least 1"),
        (damaged("host_copy_bytes_per_s", value=None), "host_copy_bytes_per_s is null"),
    ],
)
def test_a_damaged_profile_is_refused_saying_where(tmp_path: Path, values: Any, message: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ProfileError, match=message) as caught:
        MachineProfile.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file_no_json_no_place(tmp_path: Path) -> None:
    with pytest.raises(OffloadError, match="measure this machine with: offload profile"):
        MachineProfile.read(tmp_path / "machine.json")
    for text in ("{", "[" * 10**5):
        (tmp_path / "machine.json").write_text(text)
        with pytest.raises(ProfileError, match="is not JSON"):
            MachineProfile.read(tmp_path / "machine.json")
    with pytest.raises(OutputError, match=r"machine\.json is no folder"):
        machine().write(tmp_path / "machine.json" / "below")
