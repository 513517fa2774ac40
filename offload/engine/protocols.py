"""What the runtime and its neighbours know of each other: types, and protocols for what may be there or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from cache.types import Phase
from offload.checkpoint.layout import ExpertLayer
from offload.engine.host import Job
from offload.store.base import Weights

HANDLE = "_offload_layer"
"""Where an experts module keeps its runtime and layer."""

Observer = Callable[[int, int, torch.Tensor, torch.Tensor, torch.Tensor], object]
"""Is told what an expert gave: layer, expert, its output [M, H] before it is weighted, the weights [M], and which
tokens of the layer's input they are [M]."""


Group = list[tuple[int, Weights]]
"""Experts that are there, at one precision, with their parameters."""

OnHost = Callable[[int, Weights], Job]
"""Makes, of an expert and its parameters in host memory, the work that the CPU does beside the accelerator."""


class Recorder(Protocol):
    """Is told what runs while it is there; `offload.traces.recorder.TraceRecorder` is one."""

    def begin_generation(self, prompt_tokens: int, config: Any, kwargs: Mapping[str, Any]) -> None: ...

    def end_generation(self) -> None: ...

    def begin_pass(self, ids: torch.Tensor, mask: Any, length: int, phase: Phase) -> None: ...

    def record(self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> None: ...

    def end_pass(self, complete: bool) -> None: ...


class Fused(Protocol):
    """May compute whole layers; `offload.engine.fused.experts.FusedExperts` is one."""

    def __call__(
        self,
        layer: ExpertLayer,
        module: Any,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor | None: ...

    def flush(self) -> None: ...

    def forget(self) -> None: ...

    def close(self) -> None: ...
