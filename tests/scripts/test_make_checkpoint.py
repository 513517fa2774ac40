"""Random checkpoints in the true shape of known families."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from cache.errors import DiskSpaceError
from scripts.bench import make_checkpoint
from scripts.bench.families import FAMILIES, Family, tensors
from scripts.bench.make_checkpoint import write_checkpoint
from tests.scripts.small import tiny


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_transformers_loads_every_tensor_of_every_family(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    family = tiny(name)
    write_checkpoint(family, tmp_path / "model", shard_bytes=40_000)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)

    assert {key: list(found) for key, found in report.items() if found} == {}
    assert type(model).__name__ == family.architecture
    assert model.dtype == torch.bfloat16
    with torch.inference_mode():
        logits = model(torch.arange(12).reshape(1, 12)).logits
    assert logits.shape == (1, 12, 128)
    assert logits.isfinite().all()
    assert logits.std() > 0
    assert model.generation_config.eos_token_id is None


@pytest.mark.parametrize(
    ("name", "layer_bytes"),
    [("qwen3-30b-a3b", 1.2e9), ("mixtral-8x7b", 2.8e9), ("olmoe", 0.8e9), ("gpt-oss-20b", 1.6e9)],
)
def test_families_have_their_true_size(name: str, layer_bytes: float) -> None:
    family = replace(FAMILIES[name], layers=1)
    experts = sum(t.nbytes for t in tensors(family) if ".experts." in t.name)
    assert experts == pytest.approx(layer_bytes, rel=0.02)
    parameters = sum(t.values for t in tensors(FAMILIES[name])) / 1e9
    published = {"qwen3-30b-a3b": 30.5, "mixtral-8x7b": 46.7, "olmoe": 6.92, "gpt-oss-20b": 20.9}
    assert parameters == pytest.approx(published[name], rel=0.01)


def test_weights_are_normal_and_no_two_experts_alike(tmp_path: Path) -> None:
    write_checkpoint(tiny("qwen3-30b-a3b", hidden=256, intermediate=128), tmp_path / "model")
    seen = set()
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            tensor = file.get_tensor(name).float()
            if "norm" in name:
                assert (tensor == 1).all()
            elif ".experts." in name:
                assert tensor.std().item() == pytest.approx(0.02, rel=0.05)
                assert abs(tensor.mean().item()) < 0.001
                seen.add(tensor.numpy().tobytes())
            elif "embed" in name:
                assert tensor.std().item() == pytest.approx(1.28, rel=0.05)
    assert len(seen) == 2 * 8 * 3


def test_same_seed_same_bytes_and_another_seed_another_model(tmp_path: Path) -> None:
    family = tiny("olmoe")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_checkpoint(family, tmp_path / name, seed=seed, shard_bytes=30_000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_shards_keep_to_their_size_and_the_index_names_them(tmp_path: Path) -> None:
    total = write_checkpoint(tiny("mixtral-8x7b"), tmp_path / "model", shard_bytes=50_000)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())

    assert len(files) > 2
    assert {path.name for path in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == total
    names = []
    for path in files:
        with safe_open(path, framework="pt") as file:
            names += list(file.keys())
        assert path.stat().st_size < 50_000 + 20_000  # and its header
    assert sorted(names) == sorted(index["weight_map"])
    assert "model.layers.1.block_sparse_moe.experts.7.w2.weight" in names


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    family = tiny("qwen3-30b-a3b", hidden=2048, intermediate=768, experts=24, layers=1)
    tracemalloc.start()
    try:
        total = write_checkpoint(family, tmp_path / "model")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total > 200_000_000
    assert peak < 120_000_000


def test_nothing_is_left_behind_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(make_checkpoint, "config_json", fail)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tiny("olmoe"), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "model.safetensors").write_bytes(b"half")
    write_checkpoint(tiny("olmoe"), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(DiskSpaceError, match="1000 B free"):
        write_checkpoint(tiny("olmoe"), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    code = make_checkpoint.main(["--like", "olmoe", "--layers", "1", "--out", str(tmp_path / "model")])
    assert code == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {tmp_path / 'model'} already exists: remove it or choose another --out"
    ]
    assert list((tmp_path / "model").iterdir()) == []


def test_the_true_vocabulary_brings_its_special_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written: list[Family] = []
    monkeypatch.setattr(make_checkpoint, "write_checkpoint", lambda family, *_, **__: written.append(family) or 0)
    arguments = ["--like", "mixtral-8x7b", "--layers", "3", "--out", str(tmp_path / "m")]
    assert make_checkpoint.main(arguments) == 0
    assert make_checkpoint.main([*arguments, "--vocab", "true", "--experts", "4"]) == 0
    configs = [make_checkpoint.config_json(family) for family in written]
    assert [config["vocab_size"] for config in configs] == [32000, 32000]
    assert [config["eos_token_id"] for config in configs] == [None, 2]
    assert [config["num_local_experts"] for config in configs] == [8, 4]
    assert [config["num_hidden_layers"] for config in configs] == [3, 3]


@pytest.mark.parametrize("wrong", [["--layers", "0"], ["--vocab", "some"], ["--experts", "1"], ["--like", "bert"]])
def test_wrong_arguments_are_refused(wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--like", "olmoe", "--layers", "1", "--out", str(tmp_path / "model"), *wrong]
    with pytest.raises(SystemExit) as stopped:
        make_checkpoint.main(arguments)
    assert stopped.value.code == 2
    assert wrong[0] in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
