"""How fast a device computes with weights that come from memory: experts, and dense matrices.

An expert is computed by the function the runtime uses. Each run takes other weights, so many of them that the
processor's caches have forgotten a weight when its turn comes again: a large model's weights come from memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch
from torch.nn.functional import linear, silu

from cache.machine import Curve, ProductCurve
from offload.device import Device
from offload.experts import compute_expert
from offload.model import SMALL_EXPERT_BYTES
from offload.timing import median_s, rising, torch_threads

FORMATS = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOKENS = (1, 2, 4, 8, 32, 128, 512)
EXPERT_SHAPES = ((576, 64), (2048, 768), (2880, 2880))  # hidden, intermediate: the demo, Qwen3-30B-A3B, gpt-oss-20b
DENSE_SHAPE = (2048, 4096)  # inputs, outputs: a query projection of Qwen3-30B-A3B
_UNKNOWN_CACHE_BYTES = 64 * 2**20
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def expert_module() -> SimpleNamespace:
    """What `compute_expert` asks of an experts module, in the commonest design: gate and up fused, no bias."""

    def apply_gate(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate) * up

    return SimpleNamespace(
        has_gate=True, has_bias=False, is_transposed=False, has_post_expert_norm=False, _apply_gate=apply_gate
    )


class ComputeProbe:
    """Times computations on `device`, with `threads` threads where it is the CPU.

    The weights are views of one block of memory for each format, a few times as large as the processor's cache.
    """

    def __init__(self, device: Device, threads: int, block_bytes: int | None = None) -> None:
        self.device = device
        self.threads = threads
        self._block_bytes = block_bytes or min(4 * last_cache_bytes(), psutil.virtual_memory().available // 4)
        self._blocks: dict[str, torch.Tensor] = {}

    def expert(self, format: str, shape: tuple[int, int], tokens: Sequence[int] = TOKENS) -> ProductCurve:
        """One expert of `shape` (hidden, intermediate), by tokens."""
        nbytes = 3 * shape[0] * shape[1] * FORMATS[format].itemsize
        threads = 1 if nbytes < SMALL_EXPERT_BYTES else self.threads
        return ProductCurve(format, shape, nbytes, self._curve(self.expert_call(format, shape), tokens, threads))

    def dense(self, format: str, shape: tuple[int, int] = DENSE_SHAPE, tokens: Sequence[int] = TOKENS) -> ProductCurve:
        """One dense matrix of `shape` (inputs, outputs), by tokens."""
        inputs, outputs = shape
        rotation = itertools.cycle([block.view(outputs, inputs) for block in self._cut(format, inputs * outputs)])
        call = self._call(format, inputs, lambda x: linear(x, next(rotation)))
        nbytes = inputs * outputs * FORMATS[format].itemsize
        return ProductCurve(format, shape, nbytes, self._curve(call, tokens, self.threads))

    def expert_call(self, format: str, shape: tuple[int, int]) -> Callable[[int], object]:
        """A function that computes one expert for some tokens, another expert each time, and waits for the result."""
        hidden, intermediate = shape
        module = expert_module()
        rotation = itertools.cycle(
            [
                {
                    "gate_up_proj": block[: 2 * intermediate * hidden].view(-1, hidden),
                    "down_proj": block[2 * intermediate * hidden :].view(hidden, -1),
                }
                for block in self._cut(format, 3 * intermediate * hidden)
            ]
        )
        return self._call(format, hidden, lambda x: compute_expert(module, x, next(rotation)))

    def _call(
        self, format: str, width: int, compute: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[int], object]:
        inputs: dict[int, torch.Tensor] = {}

        @torch.no_grad()
        def call(tokens: int) -> None:
            if tokens not in inputs:
                inputs[tokens] = torch.ones(tokens, width, dtype=FORMATS[format], device=self.device.torch_device)
            compute(inputs[tokens])
            if (fence := self.device.fence()) is not None:
                fence.synchronize()

        return call

    def _curve(self, call: Callable[[int], object], tokens: Sequence[int], threads: int) -> Curve:
        with torch_threads(threads), self.device.computing():
            return rising({count: median_s(partial(call, count)) for count in tokens})

    def _cut(self, format: str, values: int) -> list[torch.Tensor]:
        """As many tensors of `values` numbers as the block of that format has room for."""
        dtype = FORMATS[format]
        wanted = max(self._block_bytes // dtype.itemsize, values)
        block = self._blocks.get(format)
        if block is None or block.numel() < wanted:
            block = torch.empty(wanted, dtype=dtype, device=self.device.torch_device)
            # Zeros and denormal numbers take other times than weights do.
            self._blocks[format] = block.uniform_(-0.05, 0.05, generator=torch.Generator(block.device).manual_seed(0))
        return list(self._blocks[format].split(values)[: self._blocks[format].numel() // values])


def last_cache_bytes() -> int:
    """Bytes of the processor's largest cache; where the system does not say, 64 MiB, more than most have."""
    sizes = [int(file.read_text().strip().removesuffix("K")) * 1024 for file in _CACHES.glob("index*/size")]
    return max(sizes, default=_UNKNOWN_CACHE_BYTES)
