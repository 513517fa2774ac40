"""The demo with stand-ins for its parts, and child processes that have them, too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_demo

from offload.demo import build as demo
from offload.demo import weights as dense


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tiny_demo.Tiny:
    cache = tmp_path / "cache"
    wheel = tiny_demo.wheel(cache / "downloads")
    carve = tiny_demo.carve(tmp_path / "carve.safetensors")
    pins = tiny_demo.pin(wheel)
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"pins": pins, "carve": str(carve)}))
    monkeypatch.setenv("OFFLOAD_CACHE", str(cache))
    monkeypatch.setattr(demo, "DATA_FILE", carve)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    for name, value in pins.items():
        monkeypatch.setattr(dense, name, value)
    return tiny_demo.Tiny(cache, wheel, settings)
