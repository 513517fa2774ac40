"""Offloaded runs equal resident ones bit for bit: every family, dtype, device and size of the expert cache.

`make test` runs eight families that use every flag of transformers' experts interface between them; the whole matrix is
marked `full`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import pytest
import torch
from families import PAD, Family, expert_sizes, families, routed_experts
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from cache.errors import NotMoEError, UnsupportedFamilyError
from offload.model import OffloadedModel
from offload.options import PlanOptions
from offload.plan.conversion import convert_model
from offload.plan.prepare import make_plan
from offload.store.records import RecordSlice

EVERY_FLAG = {
    "gpt_oss": "transposed weights, biases, interleaved gate and up, a clamp, one tensor for all experts on disk",
    "nemotron_h": "no gate, Mamba layers, router weights in fp32, a correction bias",
    "muse_spark": "a norm after each expert, a router of another width, images and sound beside",
    "deepseek_v3": "groups of experts, shared experts, a dense first layer, compressed attention",
    "inkling2_text": "accumulation in fp32, capped gate and up, sliding windows",
    "granitemoehybrid": "fused tensors under other names, Mamba layers, shared experts",
    "qwen3_next": "linear attention, a gated shared expert, one tensor for each expert on disk",
    "mixtral": "the plain design, w1/w2/w3 on disk",
}
CACHES = ("smaller than one expert", "two experts", "one layer", "half", "all")
PROMPT, LEFT_PADDED = 8, 3
SHORT, LONG = 64, 256


@pytest.fixture(scope="module", autouse=True)
def _quiet_single_thread() -> Iterator[None]:
    """One thread computes, as the sums of several may differ; parallel test workers get a core each."""
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    worker, cores = os.environ.get("PYTEST_XDIST_WORKER"), None
    if worker is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    yield
    if cores is not None:
        os.sched_setaffinity(0, cores)
    logging.enable_progress_bar()
    logging.set_verbosity(verbosity)
    torch.set_num_threads(threads)


class Setup(NamedTuple):
    """One cell of the matrix."""

    dtype: torch.dtype
    device: str
    cache: str
    ahead: bool = False
    """Whether experts are prefetched: what the next two gates say of this layer's input."""
    converted: bool = False
    """Whether experts come from records of the model's own precision, and not from the checkpoint."""

    def __str__(self) -> str:
        text = f"{str(self.dtype).removeprefix('torch.')}, {self.device}, expert cache: {self.cache}"
        return text + (", prefetching" if self.ahead else "") + (", converted" if self.converted else "")


QUICK = (
    Setup(torch.float32, "cpu", CACHES[0]),
    Setup(torch.bfloat16, "emulated", CACHES[0]),
    Setup(torch.bfloat16, "cpu", CACHES[1]),
    Setup(torch.float32, "emulated", CACHES[1]),
    Setup(torch.float32, "cpu", CACHES[3], ahead=True),
    Setup(torch.bfloat16, "emulated", CACHES[3], ahead=True),
)
WHOLE = tuple(
    Setup(dtype, device, cache)
    for dtype in (torch.float32, torch.bfloat16)
    for device in ("cpu", "emulated")
    for cache in CACHES
)
CONVERTED = (
    Setup(torch.float32, "cpu", CACHES[1], converted=True),
    Setup(torch.float32, "emulated", CACHES[3], converted=True),
    Setup(torch.bfloat16, "emulated", CACHES[1], converted=True),
    Setup(torch.bfloat16, "cpu", CACHES[3], ahead=True, converted=True),
)
AHEAD = tuple(setup._replace(ahead=True) for setup in WHOLE if setup.cache in CACHES[2:4])


class Forced(LogitsProcessor):  # type: ignore[misc]
    """Makes the first sequences of a batch continue with given ids [rows, steps], whatever the model says."""

    def __init__(self, ids: torch.Tensor) -> None:
        self._ids = ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen, scores = self._ids[:, input_ids.shape[1] - PROMPT, None], scores.clone()
        scores[: len(chosen)] = torch.full_like(scores[: len(chosen)], -torch.inf).scatter(1, chosen, 0.0)
        return scores


@dataclass(frozen=True)
class Run:
    """What a model says to three sequences at once: two are fed fixed random ids, the third its own greedy choice.

    The first is padded on the left. `prompt`: logits of the prompt [3, 8, vocabulary]; `logits`: of every step
    [steps, 3, vocabulary]; `greedy`: the third sequence's ids [steps].
    """

    prompt: torch.Tensor
    logits: torch.Tensor
    greedy: torch.Tensor

    @classmethod
    def of(cls, model: Any, steps: int) -> Run:
        """Runs `model`, resident or offloaded: the prompt, then one token a step with a key-value cache."""
        inputs, given = prompt(), random_ids(2, steps, seed=1)
        with torch.no_grad():
            logits = model(**inputs).logits
        output = model.generate(
            **inputs,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            logits_processor=[Forced(given)],
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert torch.equal(output.sequences[:2, PROMPT:], given)
        return cls(logits, torch.stack(output.logits), output.sequences[2, PROMPT:])

    def differences(self, other: Run) -> list[str]:
        """Where `other` is not the same, bit for bit."""
        found = []
        if not same_bits(self.prompt, other.prompt):
            found.append(f"logits of the prompt differ by up to {gap(self.prompt, other.prompt):.2g}")
        wrong = [i for i, (a, b) in enumerate(zip(self.logits, other.logits, strict=True)) if not same_bits(a, b)]
        if wrong:
            step = wrong[0]
            found.append(
                f"logits differ at {len(wrong)} of {len(self.logits)} steps, first at step {step} "
                f"by up to {gap(self.logits[step], other.logits[step]):.2g}"
            )
        if not torch.equal(self.greedy, other.greedy):
            found.append(f"greedy tokens differ from step {int((self.greedy != other.greedy).nonzero()[0])}")
        return found


def random_ids(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Ids [rows, columns] without special tokens."""
    return torch.randint(3, 250, (rows, columns), generator=torch.Generator().manual_seed(seed))


def prompt(rows: int = 3) -> dict[str, torch.Tensor]:
    """Prompts of which the first is shorter, so padded on the left."""
    ids, mask = random_ids(rows, PROMPT, seed=0), torch.ones(rows, PROMPT, dtype=torch.long)
    ids[0, :LEFT_PADDED] = PAD
    mask[0, :LEFT_PADDED] = 0
    return {"input_ids": ids, "attention_mask": mask}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same bit for bit: unlike `==`, of NaNs and zeros too."""
    whole = {2: torch.int16, 4: torch.int32}
    return a.dtype == b.dtype and torch.equal(a.view(whole[a.itemsize]), b.view(whole[b.itemsize]))


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference."""
    return float((a.float() - b.float()).abs().max())


def cache_bytes(cache: str, resident: Any) -> int:
    """Bytes for one of `CACHES`; half an expert more where slots may need padding."""
    sizes = expert_sizes(resident)
    one = max(sizes)
    layer = one * routed_experts(resident)[0].down_proj.shape[0]
    choices = (min(sizes) // 2, 2 * one + one // 2, layer + one // 2, sum(sizes) // 2, 2 * sum(sizes))
    return choices[CACHES.index(cache)]


def open_model(folder: Path, setup: Setup, nbytes: int, context: int) -> OffloadedModel:
    """The checkpoint in `folder`, offloaded as `setup` says."""
    accelerated = setup.device == "emulated"
    own, store = "fp32" if setup.dtype == torch.float32 else "bf16", folder / "experts"
    if setup.converted:
        convert_model(folder, PlanOptions(experts=own, expert_store=store))
    return OffloadedModel.from_pretrained(
        folder,
        expert_cache=nbytes,
        cpu_mem="8G",
        context=context,
        device=setup.device,
        dtype="auto",
        threads=1,
        gpu_mem="1G" if accelerated else None,
        link="500MB/s" if accelerated else None,
        predictor="cross-layer-gate" if setup.ahead else "none",
        prefetch_depth=2 if setup.ahead else None,
        experts=own if setup.converted else "auto",
        expert_store=store if setup.converted else None,
    )


def wrong_counts(setup: Setup, stats: dict[str, Any], experts: int) -> list[str]:
    """What the computing tier's counters say that a cache of this size cannot do."""
    tier = stats["tiers"]["gpu" if setup.device == "emulated" else "cpu"]
    expected = {
        CACHES[0]: tier["hits"] == tier["evictions"] == 0 < tier["bypasses"] == tier["misses"],
        CACHES[1]: tier["evictions"] > 0 and tier["bypasses"] > 0,
        CACHES[2]: tier["hits"] > 0 and tier["evictions"] > 0,
        CACHES[3]: tier["hits"] > 0 and tier["evictions"] > 0,
        CACHES[4]: tier["evictions"] == tier["bypasses"] == 0 < tier["misses"] <= experts < tier["hits"],
    }
    return [] if expected[setup.cache] else [f"counters do not fit the size of the cache: {tier}"]


def check(family: Family, setups: Sequence[Setup], steps: int, folder: Path) -> list[str]:
    """Every setup of one family against the resident model; what differs. Raises UnsupportedFamilyError."""
    found = []
    for dtype in dict.fromkeys(setup.dtype for setup in setups):
        checkpoint = folder / str(dtype)
        # One dtype in a single file, the other one in several shards.
        family.save(checkpoint, dtype, shard_size="5GB" if dtype == torch.float32 else "200KB")
        make_plan(checkpoint, PlanOptions(cpu_mem="8G", device="cpu", context=64))
        resident = family.resident(checkpoint, dtype)
        expected = Run.of(resident, steps)
        assert torch.isfinite(expected.logits).all(), f"{family.name} says nothing: its logits are not finite"
        for setup in setups:
            if setup.dtype == dtype:
                nbytes, context = cache_bytes(setup.cache, resident), 3 * (PROMPT + steps)
                with open_model(checkpoint, setup, nbytes, context) as model:
                    problems = expected.differences(Run.of(model, steps))
                    if not setup.converted:  # records are larger, and so fewer of them fit
                        problems += wrong_counts(setup, model.stats.as_dict(), len(expert_sizes(resident)))
                    elif not isinstance(model.parts.store.slices[0], RecordSlice):
                        problems.append("experts were not read from records")
                found += [f"{family.name}, {setup}: {problem}" for problem in problems]
    return found


def run_matrix(
    name: str, setups: Sequence[Setup], steps: int, folder: Path, record_property: Any, may_be_refused: bool
) -> None:
    """Checks one family and notes for the summary whether it was served or refused."""
    try:
        found = check(families()[name], setups, steps, folder)
    except UnsupportedFamilyError as error:
        assert may_be_refused, f"{name} follows the experts interface and must be served: {error}"
        assert name in str(error), f"the refusal does not name {name}: {error}"
        record_property("refused", f"{name}: {error}")
    else:
        assert not found, "\n".join(found)
        record_property("served", name)


@pytest.mark.parametrize("name", EVERY_FLAG)
def test_family_is_bit_identical(name: str, tmp_path: Path, record_property: Any) -> None:
    run_matrix(name, QUICK, SHORT, tmp_path, record_property, may_be_refused=False)


@pytest.mark.full
@pytest.mark.parametrize("name", families())
def test_family_is_bit_identical_in_every_setup(name: str, tmp_path: Path, record_property: Any) -> None:
    run_matrix(name, WHOLE, LONG, tmp_path, record_property, families()[name].may_be_refused)


@pytest.mark.full
@pytest.mark.parametrize("name", families())
def test_family_is_bit_identical_with_prefetching(name: str, tmp_path: Path, record_property: Any) -> None:
    run_matrix(name, AHEAD, LONG, tmp_path, record_property, families()[name].may_be_refused)


@pytest.mark.full
@pytest.mark.parametrize("name", families())
def test_family_is_bit_identical_from_a_converted_store(name: str, tmp_path: Path, record_property: Any) -> None:
    run_matrix(name, CONVERTED, LONG, tmp_path, record_property, families()[name].may_be_refused)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name, family in families().items() if not family.may_be_refused])
def test_quantised_family_is_the_same_wherever_its_experts_are(name: str, tmp_path: Path) -> None:
    """At every format: a run from an accelerator's two slots is, bit for bit, that with everything in memory."""
    family = families()[name]
    family.save(tmp_path / "model", torch.bfloat16, shard_size="5GB")
    one = max(expert_sizes(family.resident(tmp_path / "model", torch.bfloat16)))
    common = {"cpu_mem": "8G", "context": 256, "threads": 1, "expert_store": tmp_path / "experts"}
    for experts in ("int8", "nf4", "int4", "int2"):
        with OffloadedModel.from_pretrained(tmp_path / "model", device="cpu", experts=experts, **common) as model:
            expected = Run.of(model, 32)
        assert torch.isfinite(expected.logits).all()
        accelerated = {"device": "emulated", "gpu_mem": "1G", "link": "500MB/s", "expert_cache": 2 * one + 4096}
        with OffloadedModel.from_pretrained(tmp_path / "model", experts=experts, **accelerated, **common) as model:
            assert not expected.differences(Run.of(model, 32)), (name, experts)


def test_forty_families_must_be_served() -> None:
    required = [family for family in families().values() if not family.may_be_refused]
    assert len(required) >= 40
    assert set(EVERY_FLAG) <= families().keys()


@pytest.mark.parametrize("name", ["dbrx", "doge", "jetmoe", "switch_transformers"])
def test_another_design_is_refused_by_name_with_the_reason(name: str, tmp_path: Path, record_property: Any) -> None:
    families()[name].save(tmp_path, torch.bfloat16)
    with pytest.raises(UnsupportedFamilyError) as refusal:
        OffloadedModel.from_pretrained(tmp_path, cpu_mem="8G", device="cpu")
    message = str(refusal.value)
    assert name in message and "\n" not in message and len(message) > len(name) + 40
    record_property("refused", f"{name}: {message}")


def test_dense_model_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(NotMoEError, match=r"llama.*dense"):
        OffloadedModel.from_pretrained(tmp_path, cpu_mem="8G", device="cpu")


def test_moe_family_configured_without_experts_is_refused(tmp_path: Path) -> None:
    families()["qwen3_moe"].save(tmp_path, torch.float32, mlp_only_layers=[0, 1, 2])
    with pytest.raises(NotMoEError, match="qwen3_moe"):
        OffloadedModel.from_pretrained(tmp_path, cpu_mem="8G", device="cpu")


@pytest.fixture(scope="module", params=["qwen2_moe", "gpt_oss"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """A resident model and the same one offloaded with half of its experts cached."""
    family, folder = families()[request.param], tmp_path_factory.mktemp(request.param)
    family.save(folder, torch.bfloat16)
    resident = family.resident(folder, torch.bfloat16)
    setup = Setup(torch.bfloat16, "cpu", CACHES[3])
    with open_model(folder, setup, cache_bytes(setup.cache, resident), context=512) as model:
        yield resident, model


def assert_same_generation(pair: tuple[Any, Any], **kwargs: Any) -> torch.Tensor:
    """Both models continue the prompt alike, logits included; returns what they said, ids [rows, prompt + 32]."""
    outputs = []
    for model in pair:
        torch.manual_seed(7)
        arguments = prompt(2) | {"max_new_tokens": 32, "min_new_tokens": 32} | kwargs
        outputs.append(model.generate(**arguments, output_logits=True, return_dict_in_generate=True))
    resident, offloaded = outputs
    assert torch.equal(resident.sequences, offloaded.sequences)
    assert len(resident.logits) == len(offloaded.logits)
    assert all(same_bits(a, b) for a, b in zip(resident.logits, offloaded.logits, strict=True))
    assert pair[1].stats.as_dict()["misses"] > 0
    sequences: torch.Tensor = offloaded.sequences
    return sequences


def one_sequence() -> dict[str, torch.Tensor]:
    """A prompt that repeats itself, so that looking back finds continuations."""
    ids = random_ids(1, 6, seed=2).repeat(1, 3)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_sampling_with_a_seed(pair: tuple[Any, Any]) -> None:
    sampled = assert_same_generation(pair, do_sample=True, temperature=1.5, top_p=0.9, top_k=0)
    assert not torch.equal(sampled, assert_same_generation(pair, do_sample=False))


def test_several_samples_of_each_prompt(pair: tuple[Any, Any]) -> None:
    sampled = assert_same_generation(pair, do_sample=True, num_return_sequences=3)
    assert sampled.shape[0] == 6


def test_beam_search(pair: tuple[Any, Any]) -> None:
    beams = assert_same_generation(pair, num_beams=4, do_sample=False)
    assert not torch.equal(beams, assert_same_generation(pair, do_sample=False))


def test_static_cache(pair: tuple[Any, Any]) -> None:
    assert_same_generation(pair, do_sample=False, cache_implementation="static")


def test_prompt_in_chunks(pair: tuple[Any, Any]) -> None:
    assert_same_generation(pair, do_sample=False, prefill_chunk_size=3)


def test_prompt_lookup_decoding(pair: tuple[Any, Any]) -> None:
    assert_same_generation(pair, **one_sequence(), do_sample=False, prompt_lookup_num_tokens=3)


def test_assisted_decoding(pair: tuple[Any, Any]) -> None:
    assert_same_generation(pair, **one_sequence(), do_sample=False, assistant_model=pair[0])


class Collector(BaseStreamer):  # type: ignore[misc]
    """Passes every token on as it is generated; None ends them."""

    def __init__(self) -> None:
        self.tokens: SimpleQueue[torch.Tensor | None] = SimpleQueue()

    def put(self, value: torch.Tensor) -> None:
        self.tokens.put(value)

    def end(self) -> None:
        self.tokens.put(None)


def test_streamer_in_another_thread(pair: tuple[Any, Any]) -> None:
    inputs, streamer = one_sequence(), Collector()
    arguments = {**inputs, "max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    thread = Thread(target=pair[1].generate, kwargs={**arguments, "streamer": streamer})
    thread.start()
    heard = list(iter(streamer.tokens.get, None))
    thread.join()
    streamed = torch.cat([tokens.reshape(-1) for tokens in heard])
    assert len(heard) == 1 + 32
    assert torch.equal(streamed, pair[0].generate(**arguments)[0])
