"""OffloadedModel: a transformers model whose experts live on disk and in bounded caches."""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from cache.traces.trace import Trace
from cache.traces.writer import check_free, remove_partial
from offload.assembly.as_transformers import AsTransformers
from offload.assembly.assemble import Assembly, assemble
from offload.assembly.ending import give_back_after
from offload.assembly.figures import snapshot
from offload.assembly.one_generation import Generation
from offload.assembly.turns import in_turn
from offload.checkpoint.config.tokenizer import load_tokenizer
from offload.decide.rules import Rules
from offload.options import Keywords, LoadOptions, load_options, takes
from offload.plan.budgets import Plan
from offload.stats import Stats
from offload.traces.recorder import TraceRecorder
from offload.traces.recording import recording


class OffloadedModel(AsTransformers):
    """A Mixture-of-Experts language model inside a memory budget; behaves like the transformers model it holds.

    Make one with `from_pretrained`, or with `open` from options that are at hand; use it as a context manager, or
    `close` it, to give everything back. Threads may share it: one call at a time runs, the others wait their turn.
    `plan` says what went where, and `parts` what it is made of, for what measures or records it.
    """

    def __init__(self, parts: Assembly) -> None:
        self.parts = parts
        self.plan: Plan = parts.prepared.plan
        self._tokenizer: Any = None
        self._finalizer = give_back_after(self, parts)

    @classmethod
    @takes(Keywords)
    def from_pretrained(cls, model: str | Path, **keywords: Any) -> OffloadedModel:
        """Plan, download what is missing, and load `model`: a hub id or a folder with a Hugging Face checkpoint.

        The keyword arguments are the fields of `offload.options.LoadOptions`, and `progress`. Sizes are bytes or text
        such as "8G".

        Raises OffloadError (see `cache.errors`) for everything a user can cause, before anything large is read or
        written. Warns when an option has no effect. Side effects: torch's thread count, until `close`; and the C
        library gives large blocks of memory back as soon as they are free, from now on.
        """
        progress = keywords.pop("progress", False)
        return cls.open(model, load_options(keywords, stacklevel=3), progress=progress)

    @classmethod
    def open(cls, model: str | Path, options: LoadOptions | None = None, *, progress: bool = False) -> OffloadedModel:
        """As `from_pretrained`, by options."""
        return cls(assemble(model, options or LoadOptions(), progress=progress))

    @property
    def context(self) -> int:
        """Tokens of KV cache there is room for, all sequences together."""
        return self.plan.context

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, loaded on first use; None if it has none. Raises CheckpointError if damaged."""
        if self._tokenizer is None:
            prepared = self.parts.prepared
            self._tokenizer = load_tokenizer(prepared.source.folder, trust_remote_code=prepared.trust_remote_code)
        return self._tokenizer

    @property
    def rules(self) -> Rules:
        """What it decides by: as it was loaded, or as the methods `use_...` said since."""
        return self.parts.steering.rules

    @property
    def stats(self) -> Stats:
        """What happened since loading, or since `reset_stats`."""
        return snapshot(self.parts)

    def generate(self, *args: Any, wait: bool = True, **kwargs: Any) -> Any:
        """transformers' `generate`, with everything it takes; and `wait`: if it is False, BusyError is raised at once
        where another thread's call is running, instead of waiting for its end.

        What is longer than the workspace allows is read in several passes. Raises ContextError before it starts if
        prompt and reply may need more KV cache than there is, TransferError if an expert cannot be read, and BusyError
        if a streamer or a stopping criterion of a call asks for another one. After any error the model can be used
        again.
        """
        with self.parts.turns.taken(wait=wait):
            model = self.module
            # Who assists itself means the model inside, whose passes are a part of this turn.
            args = tuple(model if value is self else value for value in args)
            kwargs = {name: model if value is self else value for name, value in kwargs.items()}
            generation = Generation.of(model, args, kwargs)
            with self.parts.passes.generating(generation):
                return model.generate(*args, **kwargs | generation.changes(self.plan))

    @torch.no_grad()
    def forward(self, *args: Any, wait: bool = True, **kwargs: Any) -> Any:
        """transformers' `forward`; `wait` as in `generate`.

        Raises ContextError for more tokens than workspace or KV cache have room for.
        """
        with self.parts.turns.taken(wait=wait):
            module = self.module
            self.parts.passes.begin()
            return module(*args, **kwargs)

    __call__ = forward

    def record_trace(
        self,
        path: str | os.PathLike[str],
        *,
        scores: bool = False,
        predicted: int = 0,
        inputs: bool = False,
        workload: str = "unknown",
        seed: int | None = None,
        overwrite: bool = False,
    ) -> AbstractContextManager[TraceRecorder]:
        """Record which experts every token goes to, while a `with` block runs, as the trace `path` (docs/traces.md).

        Written as it goes, beside `path`, and put in place at the end; an error in the block, or a Ctrl-C, loses only
        the sequences under way, and `offload trace recover` saves those that a killed process had finished. `scores`
        adds the router's scores of all experts, `predicted` what the gates of so many next layers say of each gate's
        input, `inputs` the tokens themselves and a sketch of their embeddings. `workload` and `seed` describe the
        trace.

        Raises OutputError where no file can be written, TraceError if `path` exists (unless `overwrite`), for scores or
        predictions that the family does not give, and while generating for what has no plain sequences: beams and
        assisted decoding.
        """
        metadata = {
            "model": self.plan.model,
            "source": f"offload {version('offload')}",
            "workload": workload,
            "dtype": self.plan.dtype,
            "expert_bytes": str(self.plan.slot_bytes),
            "precision": self.parts.store.precisions[0].name,
            **({} if seed is None else {"seed": str(seed)}),
        }
        most = self.plan.layers - 1
        if predicted > most:
            warnings.warn(
                f"--predicted {predicted}: the model has {most + 1} MoE layers, and gates look at most {most} ahead",
                stacklevel=2,
            )
            predicted = most
        check_free(path, overwrite=overwrite)
        if overwrite:
            remove_partial(path)
        parts = self.parts
        found = recording(
            path, self.module, parts.runtime, parts.experts, metadata, scores=scores, predicted=predicted, inputs=inputs
        )
        return parts.turns.around(found)

    @in_turn
    def use_predictor(
        self,
        predictor: str,
        *,
        prefetcher: str = "ours",
        depth: int | None = None,
        profile: str | os.PathLike[str] | None = None,
    ) -> None:
        """From now on, fetch ahead what `prefetcher` chooses of what `predictor` expects in the next `depth` layers;
        "none": all on demand.

        As `from_pretrained` takes them, by default with the `profile` that the model was loaded with. What was learnt
        and measured for the predictor before is forgotten. Raises PolicyError and TraceError.
        """
        _ = self.module
        steering = self.parts.steering
        trained_on = steering.rules.profile if profile is None else Trace.open(profile)
        said: dict[str, Any] = {
            "predictor": predictor,
            "prefetcher": prefetcher,
            "prefetch_depth": depth,
            "profile": trained_on,
        }
        rules = replace(steering.rules, **said, optional=False)
        steering.prefetch_by(steering.settled(rules))

    @in_turn
    def use_prefill(self, prefill: str) -> None:
        """From now on, read prompts so, as `from_pretrained` takes it. Raises PolicyError.

        What is known of the prompts before is forgotten, and what was measured for streaming them.
        """
        _ = self.module
        steering = self.parts.steering
        steering.prefetch_by(steering.settled(replace(steering.rules, prefill=prefill)))

    @in_turn
    def use_quota(self, quota: str, *, profile: str | os.PathLike[str] | None = None) -> None:
        """From the next prompt on, let layers share the caches as `quota` says; experts that still fit stay.

        As `from_pretrained` takes it, by default with the `profile` that the model was loaded with. What was observed
        for the quota before is forgotten. Raises PolicyError, also where all layers have one cache, and TraceError.
        """
        _ = self.module
        steering = self.parts.steering
        trained_on = steering.rules.profile if profile is None else Trace.open(profile)
        steering.share_by(replace(steering.rules, quota=quota, profile=trained_on))

    @in_turn
    def use_scheduler(self, scheduler: str) -> None:
        """From now on, let `scheduler` say who computes what the accelerator lacks, as `from_pretrained` takes it.

        Raises PolicyError, and TransferError if the disk fails while costs are measured, the first time.
        """
        _ = self.module
        self.parts.steering.split_by(replace(self.rules, scheduler=scheduler))

    @in_turn
    def reset_stats(self) -> None:
        """Count from zero. Caches keep what they hold; the peaks of process and device memory go on."""
        self.parts.runtime.reset_stats()
        self.parts.passes.reset()

    def close(self, *, wait: bool = True) -> None:
        """Stop the threads and give all memory back, once another thread's call has ended; `wait` as in `generate`.

        The model cannot be used afterwards. Closing twice is fine. What is not closed gives all back when nobody
        refers to it any more, with a ResourceWarning.
        """
        if self.parts.turns.in_fork:  # its threads are another process's
            self.parts.module = None
            return
        with self.parts.turns.taken(wait=wait):
            self._finalizer.detach()
            self.parts.close()

    def __enter__(self) -> OffloadedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
