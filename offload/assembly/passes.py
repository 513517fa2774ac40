"""What happens around a forward pass: what is refused, which phase it is, whose threads compute, how long it takes."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch

from cache.errors import BusyError, ContextError
from cache.types import Phase
from offload.assembly.steering import Steering
from offload.assembly.turns import Turns
from offload.engine.runtime import ExpertRuntime
from offload.formats.cpu import threads
from offload.plan.prepare import Prepared
from offload.stats import Speed
from offload.system import interrupts

_LONG_CONTEXT = 2048
"""Tokens from which on attention gains more by several threads of torch's than our own kernels lose by them."""


class Passes:
    """Stands around the forward passes of `module`, until `detach`; `speed` is what they took since `reset`.

    A pass outside of a turn of `turns` has one of its own. With `own_threads` a token is computed by this project's
    threads alone.
    """

    def __init__(
        self,
        module: Any,
        runtime: ExpertRuntime,
        prepared: Prepared,
        steering: Steering,
        turns: Turns,
        *,
        own_threads: bool,
    ) -> None:
        self.speed: dict[Phase, Speed] = {}
        self.reset()
        self._runtime = runtime
        self._plan = prepared.plan
        self._device = prepared.device
        self._steering = steering
        self._turns = turns
        self._own_threads = own_threads
        self._names = [*inspect.signature(module.forward).parameters]
        self._threads = threads.count()
        self._running = False
        self._last_end: float | None = None
        self._module: Any = module
        self._compute: Any = module.forward

        @wraps(self._compute)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._pass(*args, **kwargs)

        module.forward = forward  # no hook: torch runs those behind a pass for some errors only, and not for Ctrl-C

    def detach(self) -> None:
        """Leave the module as it was, and keep no weight in memory."""
        del self._module.forward
        self._module = self._compute = None

    def reset(self) -> None:
        """Count from zero."""
        self.speed = {phase: Speed() for phase in Phase}

    def begin(self) -> None:
        """Passes that belong together follow: the time between them is a decode token's."""
        self._last_end = None

    def check_generation(self, sequences: int, prompt: int, config: Any) -> None:
        """Raises ContextError if prompts and replies may need more KV cache than there is."""
        if config.max_new_tokens is not None:
            length = prompt + config.max_new_tokens
        else:
            length = config.max_length or prompt + 20  # what transformers makes when nobody says how many
        if sequences * length > self._plan.context:
            raise ContextError(
                f"a prompt of {prompt} tokens and a reply make up to {length}, {sequences} at once: "
                f"{sequences * length} tokens of KV cache, and there is room for {self._plan.context}: "
                "lower max_new_tokens, or raise --context"
            )

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        """One pass. Raises ContextError, BusyError for one within another, and whatever computing raises."""
        with self._turns.for_pass(), ExitStack() as held:
            tokens = self._before(dict(zip(self._names, args, strict=False)) | kwargs, held)
            if tokens is None:
                return self._compute(*args, **kwargs)  # which says what is wrong with them
            complete, start = False, time.perf_counter()
            try:
                output = self._compute(*args, **kwargs)
                complete = True
                return output
            finally:
                self._after(tokens, start, complete)

    def _before(self, given: Mapping[str, Any], held: ExitStack) -> int | None:
        """What a pass needs; gives the number of its tokens, None where it was given none. `held` is what holds while
        it runs."""
        if self._running:
            raise BusyError("a forward pass is under way, and a hook within it asks for another one: wait for its end")
        ids = _read(given)
        if ids is None:
            return None
        past = given.get("past_key_values")
        length = 0 if past is None else int(past.get_seq_length())
        sequences, new = ids.shape[:2]
        self._check(sequences, length, new)
        held.enter_context(interrupts.held_back())
        self._steering.before_pass()
        runtime = self._runtime
        runtime.phase = Phase.DECODE if new == 1 and length else Phase.PREFILL
        if length == 0:
            runtime.sequence, runtime.step = runtime.sequence + 1, 0
        else:
            runtime.step += 1
        if runtime.recorder is not None:
            runtime.recorder.begin_pass(ids, given.get("attention_mask"), length, runtime.phase)
        threads.begin(self._threads)
        held.enter_context(self._device.computing())
        if self._own_threads and sequences * new == 1 and length < _LONG_CONTEXT:
            held.enter_context(threads.alone())
        self._running = True
        return int(sequences * new)

    def _after(self, tokens: int, start: float, complete: bool) -> None:
        self._running = False
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

    def _check(self, sequences: int, length: int, new: int) -> None:
        """Raises ContextError for more tokens than the KV cache or the workspace has room for."""
        if sequences * (length + new) > self._plan.context:
            raise ContextError(
                f"{sequences} sequences of {length + new} tokens need {sequences * (length + new)} tokens of KV cache, "
                f"there is room for {self._plan.context}: pass fewer, or raise --context"
            )
        if sequences * new > self._plan.chunk:
            raise ContextError(
                f"one pass of {sequences * new} tokens does not fit the workspace, "
                f"which has room for {self._plan.chunk}: pass fewer at a time, or let generate() do so, "
                "or raise the memory budget"
            )


def _read(given: Mapping[str, Any]) -> torch.Tensor | None:
    """What a pass reads: ids [sequences, tokens] or vectors [sequences, tokens, H]; None where it was given neither."""
    for name, dims in (("input_ids", 2), ("inputs_embeds", 3)):
        value = given.get(name)
        if isinstance(value, torch.Tensor) and value.dim() >= dims:
            return value
    return None
