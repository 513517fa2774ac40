"""Stock machines: all load and answer what a cost model asks, as their specifications say, and say what they are."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from machines import machine

from cache.errors import ProfileError
from cache.types import Tier
from offload.costs import stock
from offload.costs.machine import MachineProfile
from offload.costs.model import CostModel
from offload.costs.stock import find_machine, stock_machine, stock_names

GPUS = ["a6000-workstation", "rtx-3060-desktop", "rtx-4060-laptop", "rtx-4090-desktop"]
NAMES = sorted([*GPUS, "cpu-laptop-ddr5", "mini-pc-ddr4"])
MB = 10**6


def costs(name: str, tier: Tier, format: str = "bf16") -> CostModel:
    dense = format if format in stock._DENSE else "bf16"
    return CostModel(
        stock_machine(name), expert_bytes=10 * MB, format=format, tier=tier, dense_layer_bytes=MB, dense_format=dense
    )


def test_these_are_there() -> None:
    assert stock_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_machine_has_all_that_is_asked(name: str) -> None:
    profile = stock_machine(name)
    assert (profile.link is None) == (Tier.GPU not in profile.compute) == (name not in GPUS)
    for tier in profile.compute:
        for format in stock._BITS:
            model = costs(name, tier, format)
            for tokens in (1, 7, 4096):
                assert 0 < model.expert_s(tier, tokens) <= model.expert_s(tier, tokens, reading=True)
                assert model.layer_s(tokens, 4) > 0
            assert model.pass_s() > 0 and model.read_s(10 * MB) < model.read_s(10 * MB, alone=True)
            if profile.link is not None:
                assert 0 < model.link_s(10 * MB) <= model.link_s(10 * MB, computing=True)
    assert {block.threads for block in profile.disk.blocks} == {1, 2, 4, 8}


@pytest.mark.parametrize("name", NAMES)
def test_every_machine_says_that_nobody_measured_it(name: str, tmp_path: Path) -> None:
    profile = stock_machine(name)
    assert profile.estimated == f"{name}: from specifications, not measured" and profile.busy is None
    assert {"machine", "cpu", "memory", "disk", "sources"} <= set(profile.about)
    profile.write(tmp_path / "m.json")
    assert MachineProfile.read(tmp_path / "m.json") == profile


def test_figures_are_shares_of_what_is_specified() -> None:
    """The 4060 laptop: memory of 83.2 GB/s, a disk of 5.15, a link of 15.754, a GPU of 256 GB/s."""
    profile = stock_machine("rtx-4060-laptop")
    assert profile.host_read_bytes_per_s == pytest.approx(0.75 * 83.2e9)
    assert profile.host_copy_bytes_per_s == pytest.approx(0.25 * 83.2e9)
    assert profile.link is not None and profile.link.pinned.bytes_per_s == pytest.approx(0.8 * 15.754e9)
    model = costs("rtx-4060-laptop", Tier.GPU)
    assert model.read_s(10 * MB) == pytest.approx(10 * MB / (0.8 * 5.15e9), rel=1e-3)
    # An expert of 3 x 2048 x 768 bfloat16 weights, read once for a token; computed for 512 at half of 29.1 TFLOPS.
    (curve,) = (c for c in profile.compute[Tier.GPU].experts if (c.format, c.shape) == ("bf16", (2048, 768)))
    assert curve.weight_bytes == 3 * 2048 * 768 * 2
    assert curve.seconds(1) == pytest.approx(4 * 5e-6 + curve.weight_bytes / (0.75 * 256e9))
    assert curve.seconds(512) == pytest.approx(4 * 5e-6 + 512 * curve.weight_bytes / (0.5 * 29.1e12))
    (slow,) = (c for c in profile.compute[Tier.CPU].experts if (c.format, c.shape) == ("bf16", (2048, 768)))
    assert slow.seconds(1) == pytest.approx(30e-6 + slow.weight_bytes / (0.75 * 83.2e9))


def test_a_link_shares_memory_with_a_computing_cpu() -> None:
    """The 3060's link could take more than half of what DDR4 gives; the 4060 laptop's takes less."""
    for name, slower in (("rtx-3060-desktop", True), ("rtx-4060-laptop", False)):
        link = stock_machine(name).link
        assert link is not None
        assert (link.pinned_computing.bytes_per_s < link.pinned.bytes_per_s) == slower


def test_faster_parts_are_faster() -> None:
    times = [costs(name, Tier.GPU).expert_s(Tier.GPU, 1) for name in GPUS]
    a6000, rtx_3060, rtx_4060, rtx_4090 = times
    assert rtx_4090 < a6000 < rtx_3060 < rtx_4060


def test_a_file_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_machine("rtx-4060-laptop").estimated is not None
    machine().write(tmp_path / "rtx-4060-laptop")
    assert find_machine("rtx-4060-laptop") == find_machine(tmp_path / "rtx-4060-laptop") == machine()


def test_a_name_that_nobody_has_is_answered_with_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match='"rtx-9"') as caught:
        find_machine("rtx-9")
    assert all(name in str(caught.value) for name in NAMES) and "or name a file" in str(caught.value)
    for path in (tmp_path / "rtx-4060-laptop", Path("nowhere.json")):
        with pytest.raises(FileNotFoundError):
            find_machine(path)


def test_a_profile_written_before_machines_were_estimated_still_loads(tmp_path: Path) -> None:
    values = machine().as_dict()
    del values["estimated"]
    (tmp_path / "m.json").write_text(json.dumps(values))
    assert MachineProfile.read(tmp_path / "m.json") == machine()


def test_files_have_nothing_that_is_not_read() -> None:
    known = {field.name for field in fields(stock.Specification)} | {"format", "version"}
    for name in NAMES:
        values = json.loads((Path(stock.__file__).parent / "machines" / f"{name}.json").read_text())
        assert set(values) == known


def test_the_package_has_the_files() -> None:
    """What is installed is what pyproject.toml names."""
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"costs/machines/*.json"' in text
