"""What the kernels of `offload.engine.fused.kernels` compute, in plain torch, on any device: to test by, not fast.

Like there, a pair's numbers do not depend on which others are computed with it.
"""

from __future__ import annotations

import torch

from offload.engine.fused.places import ExpertPlaces, MatrixPlace
from offload.formats import find_format


def gate_up(
    x: torch.Tensor, slots: torch.Tensor, inner: torch.Tensor, block: torch.Tensor, places: ExpertPlaces
) -> None:
    """x [T, H] and slots int32 [T, K] -> `inner` [T*K, I], where a slot is not negative; `block` (uint8): the slots."""
    for pair, index in enumerate(slots.reshape(-1).tolist()):
        if index >= 0:
            y = _product(x[pair // slots.shape[1]], _slot(block, index, places), places.gate_up)
            inner[pair] = places.activation(y).to(inner.dtype)


def down(
    inner: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
    partial: torch.Tensor,
    out: torch.Tensor,
    block: torch.Tensor,
    places: ExpertPlaces,
    complete: bool,
) -> None:
    """inner [T*K, I], slots int32 [T, K], weights [T, K] -> `out` [T, H], or the pairs with slots into `partial`."""
    tokens, top_k = slots.shape
    for token in range(tokens):
        total = torch.zeros(places.down.n, device=inner.device)
        for choice in range(top_k):
            pair, index = token * top_k + choice, int(slots[token, choice])
            if index >= 0:
                y = _product(inner[pair], _slot(block, index, places), places.down)
                if not complete:
                    partial[pair] = y
            elif complete:
                y = partial[pair]
            else:
                continue
            total += y * weights[token, choice].float()
        if complete:
            out[token] = total.to(out.dtype)


def _slot(block: torch.Tensor, index: int, places: ExpertPlaces) -> torch.Tensor:
    return block[index * places.slot_bytes : (index + 1) * places.slot_bytes]


def _product(x: torch.Tensor, slot: torch.Tensor, places: MatrixPlace) -> torch.Tensor:
    """x [k] -> [n], float32."""
    views = places.views(slot)
    if "weight" in views:
        weight = views["weight"].float()
        weight = weight.t() if places.kind == "transposed" else weight
    else:
        form, level = find_format(places.kind)
        weight = form.decode(views, places.n, places.k, level, torch.float32)
    y = torch.mv(weight, x.float())
    return y + views["bias"].float() if "bias" in views else y
