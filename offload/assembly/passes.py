"""What happens around a forward pass: what is refused, which phase it is, whose threads compute, how long it takes."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from cache.errors import ContextError
from cache.types import Phase
from offload.assembly.steering import Steering
from offload.engine.runtime import ExpertRuntime
from offload.formats.cpu import threads as own_threads
from offload.plan.prepare import Prepared
from offload.stats import Speed
from offload.system import interrupts

_LONG_CONTEXT = 2048
"""Tokens from which on attention gains more by several threads of torch's than our own kernels lose by them."""


class Passes:
    """Hooks around the forward passes of `module`, until `detach`; `speed` is what they took since `reset`.

    With `own_threads` a token is computed by this project's threads alone.
    """

    def __init__(
        self, module: Any, runtime: ExpertRuntime, prepared: Prepared, steering: Steering, *, own_threads: bool
    ) -> None:
        self.speed: dict[Phase, Speed] = {}
        self.reset()
        self._runtime = runtime
        self._plan = prepared.plan
        self._device = prepared.device
        self._steering = steering
        self._own_threads = own_threads
        self._names = [*inspect.signature(module.forward).parameters]
        self._held = ExitStack()  # what holds while a pass runs
        self._start: float | None = None
        self._last_end: float | None = None
        self._tokens = 0
        self._hooks = (
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, always_call=True),
        )

    def detach(self) -> None:
        """Take the hooks off."""
        for hook in reversed(self._hooks):
            hook.remove()

    def reset(self) -> None:
        """Count from zero."""
        self.speed = {phase: Speed() for phase in Phase}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around passes that belong together: the time between them is a decode token's."""
        self._last_end = None
        with self._held:
            yield

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

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._start = None
        given = dict(zip(self._names, args, strict=False)) | kwargs
        tokens = _read(given)
        if tokens is None:
            return  # the model says what is wrong with it
        past = given.get("past_key_values")
        length = 0 if past is None else int(past.get_seq_length())
        sequences, new = tokens.shape[:2]
        self._check(sequences, length, new)
        self._steering.before_pass()
        runtime = self._runtime
        runtime.phase = Phase.DECODE if new == 1 and length else Phase.PREFILL
        if length == 0:
            runtime.sequence, runtime.step = runtime.sequence + 1, 0
        else:
            runtime.step += 1
        if runtime.recorder is not None:
            runtime.recorder.begin_pass(tokens, given.get("attention_mask"), length, runtime.phase)
        self._held.enter_context(interrupts.held_back())
        self._held.enter_context(self._device.computing())
        if self._own_threads and sequences * new == 1 and length < _LONG_CONTEXT:
            self._held.enter_context(own_threads.alone())
        self._tokens = sequences * new
        self._start = time.perf_counter()

    def _after(self, module: Any, args: Any, output: Any) -> None:
        if self._start is None:  # it was refused before it began
            return
        self._held.close()
        now = time.perf_counter()
        phase = self._runtime.phase
        start, self._start = self._start, None
        self._runtime.passed(now - start)
        if self._runtime.recorder is not None:
            self._runtime.recorder.end_pass(complete=output is not None)
        if phase is Phase.DECODE and self._last_end is not None:
            start = self._last_end
        self.speed[phase].tokens += self._tokens
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
