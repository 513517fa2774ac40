"""What does not carry over from one pass to the next by itself, and is carried here: prompts may then be cut anywhere.

A prompt that is read in chunks must be answered as one that is read whole. Attention carries its keys and values over,
and most recurrent layers of transformers their states. Found by what a model is made of, these do not:

- A Mamba-1 layer begins every pass of several tokens at a state of zeros: its scan takes none. What the state before
  adds is linear in it, so it is added to the scan's output, and to the state it leaves.
- A rotary embedding that changes with the length (longrope, dynamic) goes by the tokens so far: the first chunks of a
  long prompt would get the short one's. They are told the whole prompt's last position.
- MiniMax's cache counts the tokens of its first layer, which has none if that is linear: so masks of later passes are
  wrong. Its linear states also stay behind when beams change places.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

_RECURRENT = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
"""transformers' names for kinds of layers with states."""
_MAMBA_PARTS = ("in_proj", "dt_proj", "dt_layernorm", "c_layernorm", "out_proj")


class Carried:
    """Carries over what `model` does not by itself, until `detach`.

    `recurrent`: whether it has layers with states. They take padding for a token in a pass of a single one.
    """

    def __init__(self, model: Any) -> None:
        self.recurrent = bool(_RECURRENT & set(getattr(model.config.get_text_config(), "layer_types", None) or ()))
        self._hooks = ExitStack()
        self._embeddings = [_Rotary(each, self._hooks) for each in model.modules() if _changes_with_length(each)]
        for each in model.modules():
            if _is_mamba(each):
                _State(each, self._hooks)

    @property
    def changes_at(self) -> int:
        """The longest text whose positions are a short one's; 0 where positions do not change with the length."""
        return max((embedding.short for embedding in self._embeddings), default=0)

    def detach(self) -> None:
        """Take the hooks off."""
        self._hooks.close()

    def read_up_to(self, position: int | None) -> None:
        """The passes from now on are chunks of a text whose last token is at `position`; None: whole by themselves."""
        for embedding in self._embeddings:
            embedding.last = position


def counted(cache: Any) -> None:
    """Makes a MiniMax `cache` count its tokens, and move its linear states with the beams; does nothing to others."""
    if type(cache).__name__ == "MiniMaxCache" and not isinstance(cache, _Counted):
        cache.__class__ = _counted_class(type(cache))


def _is_mamba(module: nn.Module) -> bool:
    """Whether it is a Mamba-1 layer: decays for every channel and state, where Mamba-2 has one a head."""
    decays = getattr(module, "A_log", None)
    return (
        isinstance(decays, torch.Tensor) and decays.dim() == 2 and all(hasattr(module, name) for name in _MAMBA_PARTS)
    )


def _changes_with_length(module: nn.Module) -> bool:
    kinds: Any = getattr(module, "rope_type", None)
    names = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(name == "longrope" or "dynamic" in str(name) for name in names)


class _Rotary:
    """Lets a rotary embedding see one position more, the text's `last`, and takes that row off what it gives."""

    def __init__(self, module: Any, hooks: ExitStack) -> None:
        self.last: int | None = None
        self.short = int(module.config.rope_parameters.get("original_max_position_embeddings") or 0)
        self._given = 0
        hooks.callback(module.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        hooks.callback(module.register_forward_hook(self._after).remove)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.last is None:
            return None
        positions: torch.Tensor = args[1] if len(args) > 1 else kwargs["position_ids"]
        self._given = positions.shape[-1]
        longer = torch.cat([positions, torch.full_like(positions[..., :1], self.last)], -1)
        return ((args[0], longer, *args[2:]), kwargs) if len(args) > 1 else (args, kwargs | {"position_ids": longer})

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        return None if self.last is None else tree_map(lambda rows: rows.narrow(-2, 0, self._given), output)


class _State:
    """What a Mamba-1 layer's state before a pass of several tokens adds to that pass."""

    def __init__(self, mixer: Any, hooks: ExitStack) -> None:
        self._mixer = mixer
        self._before: torch.Tensor | None = None
        self._left = self._gate = self._steps = self._reads = torch.empty(0)
        hooks.callback(mixer.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        for name in ("in_proj", "dt_layernorm", "c_layernorm"):
            keep = functools.partial(self._keep, name)
            hooks.callback(getattr(mixer, name).register_forward_hook(keep).remove)
        hooks.callback(mixer.out_proj.register_forward_pre_hook(self._add).remove)
        hooks.callback(mixer.register_forward_hook(self._end, with_kwargs=True).remove)

    def _begin(self, mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, cache = kwargs["hidden_states"], kwargs.get("cache_params")
        state = None if cache is None or hidden.shape[1] == 1 else cache.get_recurrent_state(mixer.layer_idx)
        self._before = None if state is None else state.float().clone()  # the pass writes over it

    def _keep(self, name: str, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if self._before is None:
            return
        if name == "in_proj":
            self._gate = output.chunk(2, dim=-1)[1]  # [rows, tokens, channels]
        elif name == "dt_layernorm":
            self._steps = output
        else:
            self._reads = output.float()  # [rows, tokens, states]

    def _add(self, out_proj: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        """`args`: the scan's output [rows, tokens, channels]."""
        if self._before is None:
            return None
        projection = self._mixer.dt_proj
        steps = self._steps @ projection.weight.T + projection.bias.to(self._steps.dtype)
        time = nn.functional.softplus(steps).float().cumsum(1)  # [rows, tokens, channels]
        decay = -torch.exp(self._mixer.A_log.float())  # [channels, states]
        added = torch.zeros_like(time)
        for state in range(decay.shape[1]):
            read = self._reads[..., state, None] * self._before[:, None, :, state]
            added += read.mul_(torch.exp(time * decay[:, state]))
        self._left = self._before * torch.exp(decay * time[:, -1, :, None])
        added *= nn.functional.silu(self._gate.float())
        return (args[0] + added.to(args[0].dtype),)

    def _end(self, mixer: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._before is not None:
            cache = kwargs["cache_params"]
            cache.get_recurrent_state(mixer.layer_idx).add_(self._left)
        self._before = None
        self._left = self._gate = self._steps = self._reads = torch.empty(0)


class _Counted:
    """Goes before transformers' class of a MiniMax cache."""

    layers: list[Any]
    linear_cache: list[Any]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that it has seen, whatever the layer is."""
        return max((int(layer.get_seq_length()) for layer in self.layers), default=0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(keys that a pass of so many tokens sees, the first one's number)."""
        return self.get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Every state goes with its beam."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.linear_cache = [
            state.index_select(0, beam_idx.to(state.device)) if isinstance(state, torch.Tensor) else state
            for state in self.linear_cache
        ]


_counted_classes: dict[type, type] = {}


def _counted_class(cache: type) -> type:
    if cache not in _counted_classes:
        _counted_classes[cache] = type(cache.__name__, (_Counted, cache), {"__module__": cache.__module__})
    return _counted_classes[cache]
