"""What happens around a forward pass: what is refused, which phase it is, whose threads compute, how long it takes."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch

from cache.errors import BusyError, ContextError
from cache.types import Phase
from offload.assembly.caches import Caches
from offload.assembly.cutting import given_tokens, read_in_chunks
from offload.assembly.one_generation import Generation
from offload.assembly.steering import Steering
from offload.assembly.turns import Turns
from offload.engine.runtime import ExpertRuntime
from offload.formats.cpu import begun, threads
from offload.layers.across_passes import Carried
from offload.plan.prepare import Prepared
from offload.stats import Speed
from offload.system import interrupts

_FEW_TOKENS = 32
"""Up to so many in a pass, the rest is too little for several threads of torch's."""
_LONG_CONTEXT = 2048
"""Tokens from which on attention gains more by several threads of torch's than our own kernels lose by them."""


class Passes:
    """Stands around the forward passes of `module`, until `detach`; `speed` is what they took since `reset`.

    A pass outside of a turn of `turns` has one of its own. A pass of a token, or of few, is computed by this project's
    threads alone, where they compute the products of so many, `own_rows`.
    """

    def __init__(
        self,
        module: Any,
        runtime: ExpertRuntime,
        prepared: Prepared,
        steering: Steering,
        turns: Turns,
        *,
        own_rows: int,
    ) -> None:
        self.speed: dict[Phase, Speed] = {}
        self.reset()
        self._runtime = runtime
        self._plan = prepared.plan
        self._device = prepared.device
        self._steering = steering
        self._turns = turns
        self._own_rows = own_rows
        parameters = inspect.signature(module.forward).parameters.values()
        self._names = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
        self._threads = threads.count()
        self._running = False
        self._last_end: float | None = None
        self._generation: Generation | None = None  # the one under way
        self._carried = Carried(module)
        self._caches = Caches(module)
        self._module: Any = module
        self._compute: Any = module.forward

        @wraps(self._compute)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._run(*args, **kwargs)

        module.forward = forward  # no hook: torch runs those behind a pass for some errors only, and not for Ctrl-C

    def detach(self) -> None:
        """Leave the module as it was, and keep no weight in memory."""
        self._carried.detach()
        del self._module.forward
        self._module = self._compute = None

    def reset(self) -> None:
        """Count from zero."""
        self.speed = {phase: Speed() for phase in Phase}

    def begin(self) -> None:
        """Passes that belong together follow: the time between them is a decode token's."""
        self._last_end = None

    @contextmanager
    def generating(self, generation: Generation) -> Iterator[None]:
        """Around a call of `generate`, whose passes are cut where they are too long.

        Raises ContextError before it starts if prompts and replies may need more KV cache than there is.
        """
        recorder = self._runtime.recorder
        if recorder is not None:
            recorder.begin_generation(generation.tokens, generation.config, generation.given)
        generation.check(self._plan)
        chunk = generation.chunk(self._plan)
        if chunk is not None and chunk <= self._carried.changes_at < generation.tokens:
            raise ContextError(
                f"a prompt of {generation.tokens} tokens does not fit a pass, which has room for {chunk}, and with a "
                "static KV cache it cannot be cut where positions change with the length: take a dynamic one"
            )
        self.begin()
        self._generation = generation
        try:
            yield
        finally:
            self._generation = None
        if recorder is not None:
            recorder.end_generation()

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """A pass, or several where one is longer than the workspace allows or than `generate` was told.

        Raises ContextError, BusyError for one within another, and whatever computing raises.
        """
        with self._turns.for_pass():
            if self._running:
                raise BusyError("a forward pass is under way, and a hook within it asks for another: wait for its end")
            given = dict(zip(self._names, args, strict=False)) | kwargs
            tokens = given_tokens(given)
            if tokens is None or len(given) < len(args) + len(kwargs):
                return self._compute(*args, **kwargs)  # which says what is wrong with them
            rows, new = tokens.shape[:2]
            past = given.get("past_key_values")
            length = self._caches.length(past)
            self._check_cache(rows, length + new)
            if self._generation is not None:
                if past is None:
                    self._caches.read_anew(new)
                chunk = self._generation.longest_pass
                longest = min(self._plan.chunk, rows * (chunk or new))
                if rows * new > longest:
                    asked = chunk is not None
                    return read_in_chunks(self._pass, given, tokens, length, longest, self._carried, asked=asked)
            return self._pass(given, tokens, length)

    def _pass(self, given: dict[str, Any], tokens: torch.Tensor, length: int) -> Any:
        """One pass of `tokens`, with `length` in the KV cache."""
        with ExitStack() as held:
            self._before(given, tokens, length, held)
            complete, start = False, time.perf_counter()
            try:
                output = self._compute(**given)
                complete = True
            finally:
                self._after(tokens.shape[0] * tokens.shape[1], start, complete)
        self._caches.left(output, length + tokens.shape[1])
        return output

    def _before(self, given: Mapping[str, Any], tokens: torch.Tensor, length: int, held: ExitStack) -> None:
        """What a pass needs; `held` is what holds while it runs."""
        rows, new = tokens.shape[:2]
        self._check_workspace(rows * new)
        held.enter_context(interrupts.held_back())
        runtime = self._runtime
        runtime.mend()
        self._steering.before_pass()
        runtime.phase = Phase.DECODE if new == 1 and length else Phase.PREFILL
        read = None if self._generation is None else self._generation.read
        runtime.verifies = read is not None and new > 1 and length >= read
        if length == 0:
            runtime.sequence, runtime.step = runtime.sequence + 1, 0
        else:
            runtime.step += 1
        if runtime.recorder is not None:
            runtime.recorder.begin_pass(tokens, given.get("attention_mask"), length, runtime.phase)
        threads.begin(self._threads)
        held.enter_context(self._device.computing())
        if rows * new <= min(self._own_rows, _FEW_TOKENS) and length < _LONG_CONTEXT:
            held.enter_context(threads.alone())
        self._running = runtime.in_pass = True

    def _after(self, tokens: int, start: float, complete: bool) -> None:
        self._running = self._runtime.in_pass = False
        begun.wait()  # for what an error has left
        now = time.perf_counter()
        phase = self._runtime.phase
        self._runtime.passed(now - start, complete=complete)
        if self._runtime.recorder is not None:
            self._runtime.recorder.end_pass(complete=complete)
        if phase is Phase.DECODE and self._last_end is not None:
            start = self._last_end
        self.speed[phase].tokens += tokens
        self.speed[phase].seconds += now - start
        self._last_end = now

    def _check_cache(self, rows: int, length: int) -> None:
        """Raises ContextError for more tokens than the KV cache has room for."""
        if rows * length > self._plan.context:
            raise ContextError(
                f"{rows} sequences of {length} tokens need {rows * length} tokens of KV cache, "
                f"there is room for {self._plan.context}: pass fewer, or raise --context"
            )

    def _check_workspace(self, tokens: int) -> None:
        """Raises ContextError for more tokens than the workspace has room for."""
        if tokens > self._plan.chunk:
            raise ContextError(
                f"one pass of {tokens} tokens does not fit the workspace, "
                f"which has room for {self._plan.chunk}: pass fewer at a time, or let generate() do so, "
                "or raise the memory budget"
            )
