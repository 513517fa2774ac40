"""Calibration: the average step from gate to gate, what it is worth, which experts matter, and where it is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny_chat import save_checkpoint
from torch.nn import functional

from cache.errors import TraceError
from cache.traces.trace import Trace
from cache.types import ExpertKey
from offload.decide.fallbacks.adapmoe import AdapMoE
from offload.layers.calibration import Calibration, find_calibration, gates_fingerprint
from offload.layers.lookahead import GateLookahead
from offload.layers.router import router_beside
from offload.model import OffloadedModel
from offload.quality.gates import MeanInputs, Recall, attached
from offload.quality.sensitivity import ExpertOutputs, LayerSensitivity
from offload.system import quiet
from offload.system.paths import calibration_path, own_place
from offload.terminal import main as cli

PLAIN = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4}
pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    yield from tiny.one_thread()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, threads: None) -> Iterator[OffloadedModel]:
    with tiny.open_model(tiny.save(tmp_path_factory.mktemp("model"), "qwen3_moe")) as model:
        yield model


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "cache"))


def test_offsets_are_the_average_step(model: OffloadedModel) -> None:
    inputs: list[list[torch.Tensor]] = [[] for _ in model.parts.experts.layers]
    routers: list[Any] = [router_beside(model.module, layer)[1] for layer in model.parts.experts.layers]
    hooks = [
        router.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        for router, seen in zip(routers, inputs, strict=True)
    ]
    means = MeanInputs(model.module, model.parts.experts)
    with attached(means):
        model.generate(tiny.ids(2, 9), **PLAIN)
        model.generate(tiny.ids(1, 5), **PLAIN)
    for hook in hooks:
        hook.remove()
    assert means.tokens == 2 * 12 + 8
    steps = torch.stack([torch.cat(seen) for seen in inputs]).diff(dim=0).mean(1)
    assert np.allclose(means.offsets(), steps.numpy(), atol=1e-6)
    assert not any(router._forward_pre_hooks for router in routers)


def test_recall_is_that_of_a_trace(model: OffloadedModel, tmp_path: Path) -> None:
    recall = Recall(model.module, model.parts.experts, 3)
    with attached(recall), model.record_trace(tmp_path / "t", predicted=2):
        model.generate(tiny.ids(2, 9), **PLAIN)
    trace = Trace.open(tmp_path / "t")
    assert trace.predicted is not None
    for distance in (1, 2):
        said, chosen = trace.predicted[:, :-distance, distance - 1], trace.experts[:, distance:]
        named = (said[..., None] == chosen[..., None, :]).any(-1)
        expected = [named[..., : trace.top_k].sum() / chosen.size, named.sum() / chosen.size]
        assert recall.share[distance - 1].tolist() == expected
    assert recall.share[2].tolist() == [0, 0]  # there are three layers


def test_offsets_that_lead_to_the_next_input_find_every_expert(model: OffloadedModel) -> None:
    """Of a single token: its own step."""
    means = MeanInputs(model.module, model.parts.experts)
    with attached(means):
        model(tiny.ids(1, 1))
    recall = Recall(model.module, model.parts.experts, 2, means.offsets())
    with attached(recall):
        model(tiny.ids(1, 1))
    assert recall.share[:, 0].tolist() == [1, 1]


def test_it_is_found_for_the_same_model_only(model: OffloadedModel, tmp_path: Path) -> None:
    inner, experts = model.module, model.parts.experts
    assert find_calibration(inner, experts) is None
    found = Calibration(gates_fingerprint(inner, experts), np.ones((2, 64), np.float32), {"workload": "tests"})
    found.write(own_place(calibration_path(found.fingerprint)))
    again = find_calibration(inner, experts)
    assert again is not None and np.array_equal(again.offsets, found.offsets) and again.metadata["workload"] == "tests"
    GateLookahead(inner, experts, 1, lambda layer, predicted: None, offsets=again.offsets).detach()
    with tiny.open_model(tiny.save(tmp_path / "other", "qwen2_moe")) as other:
        assert find_calibration(other.module, other.parts.experts) is None


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "nonsense").write_text("nonsense")
    with pytest.raises(TraceError, match="nonsense"):
        Calibration.read(tmp_path / "nonsense")
    Calibration("x", np.full((2, 3), np.nan, np.float32), {}).write(tmp_path / "damaged")
    with pytest.raises(TraceError, match="damaged: run `offload calibrate` again"):
        Calibration.read(tmp_path / "damaged")


def test_what_experts_gave(model: OffloadedModel) -> None:
    """Against the experts' outputs one by one: a single token, so that each is a row of its own."""
    inner, experts = model.module, model.parts.experts
    outputs = ExpertOutputs(inner, model.parts.runtime, experts)
    given: dict[ExpertKey, tuple[torch.Tensor, float]] = {}
    see = model.parts.runtime.observer
    assert see is not None

    def note(layer: int, expert: int, output: torch.Tensor, weights: torch.Tensor, tokens: torch.Tensor) -> None:
        given[ExpertKey(layer, expert)] = output[0], float(weights[0])
        see(layer, expert, output, weights, tokens)

    model.parts.runtime.observer = note
    with attached(outputs):
        streams = model(tiny.ids(1, 1), output_hidden_states=True).hidden_states
    model(tiny.ids(1, 3))  # nobody watches
    assert len(given) == len(experts.layers) * inner.config.num_experts_per_tok
    assert set(given) == {ExpertKey(*map(int, key)) for key in np.argwhere(outputs.maxima)}
    for key, (output, weight) in given.items():
        assert outputs.maxima[key] == output.abs().max()
        if key.layer + 2 < len(streams):  # the last one is normalised
            stream = max(float(streams[at].norm()) for at in (key.layer, key.layer + 1))
            assert outputs.energy[key] == pytest.approx((weight * float(output.norm()) / stream) ** 2, rel=1e-4)


@pytest.mark.parametrize("renormalise", [True, False])
def test_sensitivity_is_what_dropping_an_expert_costs(tmp_path: Path, renormalise: bool) -> None:
    """Of two experts a token: against the same model with the second one's weight taken away by hand."""
    folder, tokens = tiny.save(tmp_path / "model", "mixtral"), tiny.ids(1, 20)
    with tiny.open_model(folder, context=64) as model:
        layers = len(model.parts.experts.layers)
        least, done = LayerSensitivity(layers, renormalise=renormalise), list[int]()
        least.measure(model, tokens.tolist(), 16, done.append)
        outputs = ExpertOutputs(model.module, model.parts.runtime, model.parts.experts)
        with attached(outputs):
            model(tokens[:, :16])
        assert (least.tokens, sum(done)) == (16, 16)
        importance = least.importance(outputs, 16)
    plain = tiny.resident(folder)
    experts: list[Any] = [module for name, module in plain.named_modules() if name.endswith(".experts")]

    @torch.no_grad()
    def said() -> torch.Tensor:
        return functional.log_softmax(plain(tokens[:, :16]).logits[0].double(), -1)

    def drop(module: object, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, chosen, weights = args
        shares.append(weights.min(-1).values / weights.sum(-1))
        whole = weights.sum(-1)[:, None] if renormalise else weights
        return hidden, chosen, torch.where(weights == weights.max(-1, keepdim=True).values, whole, 0)

    intact = said()
    for layer, module in enumerate(experts):
        shares: list[torch.Tensor] = []
        hook = module.register_forward_pre_hook(drop)
        kl = (intact.exp() * (intact - said())).sum(-1).mean()
        hook.remove()
        assert least.weight[layer] == pytest.approx(float(kl / shares[0].square().mean()), rel=1e-2)
    assert (least.weight > 0).all() and importance.shape == outputs.maxima.shape
    assert ((importance > 0) == (outputs.energy > 0)).all()


def test_sensitivity_takes_as_many_passes_as_there_is_room_for(model: OffloadedModel, tmp_path: Path) -> None:
    wide, narrow = LayerSensitivity(3), LayerSensitivity(3)
    sequences = tiny.ids(2, 30).tolist()
    wide.measure(model, sequences, 40, lambda read: None)
    with tiny.open_model(model.parts.prepared.source.folder, context=70) as tight:  # a sequence and one layer at a time
        narrow.measure(tight, sequences, 40, lambda read: None)
    assert wide.tokens == narrow.tokens == 40
    assert np.allclose(wide.weight, narrow.weight, rtol=0.05)


def test_super_experts_stand_out() -> None:
    maxima = np.ones((10, 40), np.float32)
    assert not Calibration("x", np.ones((9, 4), np.float32), {}).super_experts
    maxima[3, 7], maxima[5, 0], maxima[9, 39] = 1000, 150, 50  # the last one is under a tenth
    found = Calibration("x", np.ones((9, 4), np.float32), {}, maxima=maxima)
    assert found.super_experts == {ExpertKey(3, 7), ExpertKey(5, 0)}


def test_everything_comes_back_from_the_file_and_older_files_are_read(tmp_path: Path) -> None:
    offsets, by_layer, by_expert = np.ones((2, 4), np.float32), np.ones(3, np.float32), np.eye(3, 5, dtype=np.float32)
    Calibration("x", offsets, {}).write(tmp_path / "old")
    old = Calibration.read(tmp_path / "old")
    assert (old.maxima, old.sensitivity, old.importance) == (None, None, None) and not old.super_experts
    assert old.unscaled_sensitivity is None
    Calibration("x", offsets, {}, by_expert, by_layer, 2 * by_expert, 3 * by_layer).write(tmp_path / "new")
    new = Calibration.read(tmp_path / "new")
    assert np.array_equal(new.unscaled_sensitivity, 3 * by_layer)  # type: ignore[arg-type]
    for kept, given in ((new.maxima, by_expert), (new.sensitivity, by_layer), (new.importance, 2 * by_expert)):
        assert np.array_equal(kept, given)  # type: ignore[arg-type]
    Calibration("x", offsets, {}, sensitivity=by_expert).write(tmp_path / "damaged")
    with pytest.raises(TraceError, match="damaged"):
        Calibration.read(tmp_path / "damaged")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(quiet, "prepare", lambda: None)  # it sets up the whole process
    checkpoint = save_checkpoint(tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Hi", "Who are you?", "Why?")))
    flags = ["--prompts", str(prompts), "--max-new-tokens", "3", "--cpu-mem", "8G", "--device", "cpu", "--threads", "1"]

    def run(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            cli.main(["calibrate", str(checkpoint), *flags, *args])
        return int(leaving.value.code or 0), *capsys.readouterr()

    code, out, err = run("--json", "--depth", "1", "--sensitivity", "20")
    assert code == 0, err
    figures = json.loads(out)
    assert figures["workload"] == "prompts.jsonl" and figures["tokens"] > 6
    for recall in (figures["recall"], figures["recall_with_offsets"]):
        assert 0 < recall[0][0] <= recall[0][1] <= 1 and len(recall) == 1
    assert figures["sensitivity_tokens"] == 20 and all(weight > 0 for weight in figures["sensitivity"])
    assert len(figures["super_experts"]) == 1 and len(figures["importance"]) == 2
    assert len(figures["unscaled_sensitivity"]) == 2 and figures["unscaled_sensitivity"] != figures["sensitivity"]
    for fallback, name in (("", "sensitivity"), (", renormalise=False", "unscaled_sensitivity")):
        with tiny.open_model(checkpoint, fallback=f"adapmoe(skip=True{fallback})") as model:
            own = model.parts.prepared.fallback
            assert isinstance(own, AdapMoE)
            measured = np.array(figures[name])
            assert own.by_layer == pytest.approx(measured / measured.mean())
    with tiny.open_model(checkpoint) as model:
        stored = find_calibration(model.module, model.parts.experts)
        assert stored is not None and stored.metadata["tokens"] == str(figures["tokens"])
        assert [list(key) for key in stored.super_experts] == figures["super_experts"]
    code, out, err = run("-n", "2", "-o", str(tmp_path / "mine"), "--depth", "2", "--sensitivity", "0")
    assert code == 0 and "with offsets" in out and out.count("%") == 8 and "super experts" in out, err
    mine = Calibration.read(tmp_path / "mine")
    assert mine.fingerprint == stored.fingerprint and mine.sensitivity is None and mine.importance is None
    assert run("-n", "1")[0] == 2
