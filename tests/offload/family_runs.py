"""What every family's offloaded run is compared by: prompts, forced continuations, logits, sizes of the cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tiny
import torch
from families import expert_sizes, routed_experts
from small_config import PAD
from transformers import LogitsProcessor

from offload.model import OffloadedModel
from offload.options import PlanOptions
from offload.plan.conversion import convert_model

CACHES = ("smaller than one expert", "two experts", "one layer", "half", "all")
PROMPT, LEFT_PADDED = 8, 3


def one_core() -> Iterator[None]:
    """A fixture's body: one thread computes, as in `tiny.one_thread`, and parallel test workers get a core each."""
    worker, cores = os.environ.get("PYTEST_XDIST_WORKER"), None
    if worker is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    yield from tiny.one_thread()
    if cores is not None:
        os.sched_setaffinity(0, cores)


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
        inputs, given = prompt(), tiny.ids(2, steps, seed=1)
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
        if not tiny.same_bits(self.prompt, other.prompt):
            found.append(f"logits of the prompt differ by up to {gap(self.prompt, other.prompt):.2g}")
        wrong = [i for i, (a, b) in enumerate(zip(self.logits, other.logits, strict=True)) if not tiny.same_bits(a, b)]
        if wrong:
            step = wrong[0]
            found.append(
                f"logits differ at {len(wrong)} of {len(self.logits)} steps, first at step {step} "
                f"by up to {gap(self.logits[step], other.logits[step]):.2g}"
            )
        if not torch.equal(self.greedy, other.greedy):
            found.append(f"greedy tokens differ from step {int((self.greedy != other.greedy).nonzero()[0])}")
        return found


def prompt(rows: int = 3) -> dict[str, torch.Tensor]:
    """Prompts of which the first is shorter, so padded on the left."""
    ids, mask = tiny.ids(rows, PROMPT, seed=0), torch.ones(rows, PROMPT, dtype=torch.long)
    ids[0, :LEFT_PADDED] = PAD
    mask[0, :LEFT_PADDED] = 0
    return {"input_ids": ids, "attention_mask": mask}


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
        exact=True,
        gpu_mem="1G" if accelerated else None,
        link="500MB/s" if accelerated else None,
        predictor="cross-layer-gate" if setup.ahead else "none",
        prefetch_depth=2 if setup.ahead else None,
        experts=own if setup.converted else "auto",
        expert_store=store if setup.converted else None,
    )
