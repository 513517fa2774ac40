"""What regressions over recorded routing see, and what they have learned: what `learned` predicts with.

`predictors.training` makes them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import PolicyError, TraceError
from cache.traces.tensorfile import Column, read_tensors, row_blocks, write_tensors

FORMAT = "offload-predictor"
RATES = (0.5, 0.1, 0.02)
"""At which counts of uses fade, a pass."""
GAINS = np.sqrt(np.array(RATES, np.float32))
"""What a use adds to each count: so they are as large as each other, and one penalty suits all."""

POINTS = np.linspace(0, 1, 41)
"""Forecast shares for which it is known what came of them."""

Array = NDArray[np.float32]
_ONE = np.ones(1, np.float32)


@dataclass(frozen=True, eq=False)
class Regressions:
    """What was learned of a model of L layers of E experts: for each layer and distance up to D, F numbers an expert.

    The F features are, each for all experts: how the last `window` layers routed, how the layer that is asked for did
    last, its counts of uses fading at `RATES`; what its gate said ahead (first K, next K), where `ahead`; and a one.
    """

    weights: NDArray[np.float16]
    """[L, D, F, E]."""
    curves: Array
    """[D, 41]: how many of the forecasts at each of `POINTS` came true; sums know no bounds, and are cautious."""
    window: int
    top_k: int
    ahead: bool
    model: str = "unknown"

    @property
    def shape(self) -> tuple[int, int]:
        """L and E."""
        return self.weights.shape[0], self.weights.shape[3]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Store them at `path`, atomically. Raises OutputError and DiskSpaceError."""
        said = {"window": self.window, "top_k": self.top_k, "ahead": int(self.ahead)}
        metadata = {"format": FORMAT, "version": "1", "model": self.model, **{k: str(v) for k, v in said.items()}}
        arrays: dict[str, NDArray[Any]] = {"weights": self.weights, "curves": self.curves}
        write_tensors(path, {k: Column(v.dtype, v.shape, row_blocks(v)) for k, v in arrays.items()}, metadata)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Regressions:
        """What `write` stored. Raises PolicyError for a file that is none, or cannot be read."""
        try:
            arrays, metadata = read_tensors(path)
            if (metadata.get("format"), metadata.get("version")) != (FORMAT, "1"):
                raise PolicyError(f"{path} is not what `offload train-predictor` stores")
            window, top_k, ahead = (int(metadata[name]) for name in ("window", "top_k", "ahead"))
            weights, curves = arrays["weights"], np.array(arrays["curves"], np.float32)
            wanted = num_features(weights.shape[3], window, bool(ahead)), (weights.shape[1], len(POINTS))
            if weights.dtype != np.float16 or (weights.shape[2], curves.shape) != wanted:
                raise ValueError
            if not np.isfinite(weights).all() or curves.min() < 0 or not curves.max() <= 1:
                raise ValueError
        except TraceError as error:
            raise PolicyError(str(error)) from error
        except OSError as error:
            raise PolicyError(f"{path} cannot be read: {error.strerror}") from error
        except (KeyError, ValueError, IndexError):
            raise PolicyError(f"{path} is damaged: run `offload train-predictor` again") from None
        return cls(weights, curves, window, top_k, bool(ahead), metadata.get("model", "unknown"))


def num_features(experts: int, window: int, ahead: bool) -> int:
    """F."""
    return (window + 1 + len(RATES) + 2 * ahead) * experts + 1


class State:
    """What the regressions see, kept up to date event by event. Shares are of a pass's tokens, from 0 to 1."""

    def __init__(self, layers: int, experts: int, window: int) -> None:
        self._layers = layers
        # Of each layer all that is known of it, side by side: how it did last, and its counts.
        self._own = np.zeros((layers, 1 + len(RATES), experts), np.float32)
        self._keep = 1 - np.array(RATES, np.float32)[:, None]
        self._window = (np.arange(layers)[:, None] - np.arange(window)) % layers

    def update(self, layer: int, shares: Array) -> None:
        """Layer `layer` gave each expert that share [E] of its tokens."""
        own = self._own[layer]
        own[0] = shares
        faded = own[1:]
        faded *= self._keep
        faded += GAINS[:, None] * shares

    def features(self, layer: int, distance: int, ahead: Array | None) -> Array:
        """[F], after `layer`, of the one that runs `distance` later."""
        recent = self._own[self._window[layer], 0].ravel()
        own = self._own[(layer + distance) % self._layers].ravel()
        return np.concatenate([recent, own, _ONE] if ahead is None else [recent, own, ahead, _ONE])


def named(ahead: Sequence[Sequence[int]], distance: int, experts: int, top_k: int) -> Array:
    """What the gate that far ahead said, as features [2 E]: the first K experts, and the K after them."""
    found = np.zeros((2, experts), np.float32)
    if distance <= len(ahead):
        said = list(ahead[distance - 1])
        found[0, said[:top_k]] = 1
        found[1, said[top_k : 2 * top_k]] = 1
    return found.ravel()
