"""A layer's routing pair by pair, each a token and one of its experts: who computes what, and for which event."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch

from cache.traces.by_token import Mask, Routed, least, weight_before
from cache.types import Phase
from offload.engine.events import Events


class Pairs(NamedTuple):
    """Pair t * K + k is the k-th of token t. Expert e computes the pairs `order[slice(*spans[e])]`; those that nobody
    computes are in `dropped`.

    `experts` with the total weight and the number of tokens of each make the event.
    """

    experts: list[int]
    totals: list[float]
    tokens: list[int]
    order: torch.Tensor
    spans: dict[int, tuple[int, int]]
    dropped: torch.Tensor | None

    @classmethod
    def of(cls, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, kept: torch.Tensor | None = None) -> Pairs:
        """From experts and weights [T, K], and which of them are `kept` [T, K] if not all are."""
        num_tokens, num_top_k = top_k_index.shape
        if num_tokens == 1 and kept is None:
            experts = top_k_index.tolist()[0]
            if len(set(experts)) == num_top_k:
                order = _first_numbers(num_top_k, top_k_index.device)
                spans = {expert: (k, k + 1) for k, expert in enumerate(experts)}
                return cls(experts, top_k_weights.tolist()[0], [1] * num_top_k, order, spans, None)
        ids, weights, places, dropped = top_k_index.reshape(-1), top_k_weights.reshape(-1), None, None
        if kept is not None:
            places, dropped = (mask.reshape(-1).nonzero()[:, 0] for mask in (kept, ~kept))
            ids, weights = ids[places], weights[places]
        # As transformers does: in which order an expert has its rows changes the bits of some products.
        in_order, order = torch.sort(ids)
        experts, tokens, spans = _groups(in_order.tolist())
        totals = _totals(weights[torch.sort(ids, stable=True).indices], spans)
        return cls(experts, totals, tokens, order if places is None else places[order], spans, dropped)


def ask_tokens(
    events: Events, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor | None:
    """Ask of each token what the fallback wants to know, and tell `events` for the event to come.

    Experts and weights [T, K] of a layer -> which pairs are kept [T, K], None for all. Waits for the device where there
    is something to ask. Raises what a fallback raises.
    """
    asked, several = events.by_token, len(top_k_index) > 1
    if asked is None or (asked.keep is None and not several):
        return None
    experts = top_k_index.cpu().numpy()
    weights = top_k_weights.detach().to("cpu", torch.float32).numpy().astype(np.float64)
    kept: Mask | None = None
    if asked.keep is not None:
        continues = events.phase is Phase.DECODE or events.verifies
        kept = asked.keep(Routed(layer, experts.astype(np.int64), weights, continues))
    before: dict[int, float] = {}
    if asked.before and several:
        pairs = slice(None) if kept is None else kept.ravel()
        ids, shares = experts.ravel()[pairs], weight_before(experts, weights).ravel()[pairs]
        before = dict(enumerate(least(ids, shares, int(ids.max()) + 1).tolist()))
    events.receive_tokens(layer, before, 0 if kept is None else int(np.count_nonzero(~kept)))
    return None if kept is None else torch.from_numpy(kept).to(top_k_index.device)


def rescaled(weights: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """weights [T, K], of which those `kept` take over the others' share: a token's sum is as before."""
    wide = weights.float()
    rest = (wide * kept).sum(-1, keepdim=True)
    return (wide * torch.where(rest > 0, wide.sum(-1, keepdim=True) / rest, 0)).to(weights.dtype)


@functools.lru_cache(maxsize=64)
def _first_numbers(count: int, device: torch.device) -> torch.Tensor:
    """0 to count - 1, which nobody may change."""
    return torch.arange(count, device=device)


def _groups(ids: list[int]) -> tuple[list[int], list[int], dict[int, tuple[int, int]]]:
    """From sorted expert ids: the experts, their token counts, and the rows [start, end) of each."""
    spans: dict[int, tuple[int, int]] = {}
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or ids[end] != ids[start]:
            spans[ids[start]] = (start, end)
            start = end
    return list(spans), [end - start for start, end in spans.values()], spans


def _totals(row_weights: torch.Tensor, spans: dict[int, tuple[int, int]]) -> list[float]:
    values: list[float] = row_weights.tolist()
    return [_sum(values[start:end]) for start, end in spans.values()]


def _sum(values: list[float]) -> float:
    """One by one, in order, as a replay does: `sum` compensates for rounding, from Python 3.12 on."""
    total = 0.0
    for value in values:
        total += value
    return total
