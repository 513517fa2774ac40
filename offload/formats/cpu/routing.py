"""One token's router in one call of our kernel: scores, the experts that have the highest, and their weights."""

from __future__ import annotations

from array import array

import torch

from offload.formats.cpu import native
from offload.formats.cpu import threads as own_threads
from offload.formats.cpu.room import room


def route(
    x: torch.Tensor,
    weight: torch.Tensor,
    top_k: int,
    *,
    of_chosen: bool,
    scaled: bool,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [1, H] and weight [E, H], bfloat16, H a multiple of 32 -> scores [1, E], and of the `top_k` highest weights
    [1, K] of `dtype`, bfloat16 or float32, and which experts' they are [1, K], the highest first.

    Weights are the softmax of all scores, or with `of_chosen` of those chosen; with `scaled` their sum is made 1. bias
    [E], bfloat16, is added to scores.
    """
    rounds = dtype == torch.bfloat16
    scores = torch.empty(1, len(weight), dtype=torch.bfloat16, device="cpu")
    weights = torch.empty(1, top_k, dtype=dtype, device="cpu")
    chosen = torch.empty(1, top_k, dtype=torch.int64, device="cpu")
    memory = room(_room_bytes(weight))
    scratch = torch.empty(1, top_k, dtype=torch.float32, device="cpu") if rounds else weights
    outputs = scores.data_ptr(), chosen.data_ptr(), scratch.data_ptr(), weights.data_ptr() if rounds else 0
    told = _job(x.data_ptr(), weight, bias, outputs, memory.data_ptr(), top_k, of_chosen, scaled)
    lib = native.library()
    assert lib is not None
    lib.route(told.buffer_info()[0], own_threads.count())
    return scores, weights, chosen


class TokenRouter:
    """The same for a kernel that goes on to the router by itself: it is told `job`, and leaves what was chosen here.

    What it says is as `route` says it. The matrix and the bias must stay.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        top_k: int,
        *,
        of_chosen: bool,
        scaled: bool,
        rounds: bool,
        bias: torch.Tensor | None = None,
    ) -> None:
        self.experts = array("q", bytes(8 * top_k))
        self.weights = array("f", bytes(4 * top_k))
        """Where the experts' outputs have to be weighted by bfloat16, such numbers."""
        self._rounded = array("H", bytes(2 * top_k)) if rounds else None
        self._scores = array("H", bytes(2 * len(weight)))
        self.rounds = rounds
        """Whether that is so."""
        self.room_bytes = _room_bytes(weight)
        self._held = weight, bias
        scores, chosen, weights = (each.buffer_info()[0] for each in (self._scores, self.experts, self.weights))
        rounded = 0 if self._rounded is None else self._rounded.buffer_info()[0]
        self.weights_at = rounded or weights
        """The address of the weights, in the dtype of which they are."""
        self._told = _job(0, weight, bias, (scores, chosen, weights, rounded), 0, top_k, of_chosen, scaled)

    def job(self, x: int, memory: int) -> int:
        """The address of what the kernel is told: x [H] and `room_bytes` of memory are addresses, too."""
        self._told[0], self._told[7] = x, memory
        return self._told.buffer_info()[0]


def _job(
    x: int,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    outputs: tuple[int, int, int, int],
    memory: int,
    top_k: int,
    of_chosen: bool,
    scaled: bool,
) -> array[int]:
    """What the kernel is told. `outputs` are the addresses of scores, experts, weights as float32 and as bfloat16."""
    bias_at = 0 if bias is None else bias.data_ptr()
    return array("q", (x, weight.data_ptr(), bias_at, *outputs, memory, *weight.shape, top_k, of_chosen, scaled))


def _room_bytes(weight: torch.Tensor) -> int:
    experts, k = weight.shape
    return 4 * (2 * k + 2 * experts + 32)
