"""What a forward pass reads, seen where its tokens become embeddings: before the first layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cache.errors import TraceError
from offload.layers.router import family_of, half_precision

SKETCH = 64
"""Numbers that stand for an embedding."""

Receive = Callable[[torch.Tensor, NDArray[np.float16]], object]
"""Is told of ids [tokens] and of sketches of their embeddings [tokens, SKETCH]."""


class Openings:
    """While attached, tells `receive` what every pass of `model` reads; a pass that is given embeddings has no ids, and
    is not told of. Nothing is computed unless `wanted`.

    Raises TraceError, naming the family, where transformers does not know the model's embeddings.
    """

    def __init__(self, model: Any, receive: Receive, wanted: Callable[[], bool] = lambda: True) -> None:
        try:
            embedding = model.get_input_embeddings()
        except NotImplementedError as error:
            family = family_of(model)
            raise TraceError(f'what the "{family}" family reads cannot be seen: it has no embeddings') from error
        self._receive = receive
        self._wanted = wanted
        self._signs: torch.Tensor | None = None
        self._hook = embedding.register_forward_hook(self._seen)

    def detach(self) -> None:
        """Take the hook off."""
        self._hook.remove()

    @torch.no_grad()
    def _seen(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if not args or not self._wanted():
            return
        rows = output.detach().flatten(0, -2).float()
        if self._signs is None:
            self._signs = torch.from_numpy(signs(rows.shape[-1])).to(rows.device)
        self._receive(args[0].flatten().cpu(), half_precision(rows @ self._signs))


def signs(width: int) -> NDArray[np.float32]:
    """[width, SKETCH]: random signs, the same on every machine, scaled so that lengths stay about as they are.

    Cosines of sketches are about those of what was sketched.
    Source: Achlioptas, Database-friendly random projections, 2003.
    """
    bits = np.unpackbits(np.random.PCG64(0).random_raw(width).astype("<u8").view(np.uint8))
    found: NDArray[np.float32] = ((bits.astype(np.float32) * 2 - 1) / np.float32(SKETCH**0.5)).reshape(width, SKETCH)
    return found
