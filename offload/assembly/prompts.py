"""What is decided about a prompt before `generate` reads it: whether it fits, and who cuts it."""

from __future__ import annotations

import warnings
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from cache.errors import ContextError
from offload.plan.budgets import Plan


def with_cache(module: Any) -> None:
    """Lets `module` keep a KV cache where its checkpoint says that it does not, with a warning.

    Training with gradient checkpointing leaves `use_cache: false` in a configuration. A reply needs the cache: without,
    every token is read with all before it, for which the plan has no room.
    """
    configs = (module.config, module.config.get_text_config(), module.generation_config)
    if any(getattr(config, "use_cache", None) is False for config in configs):
        warnings.warn(
            "the checkpoint says use_cache: false, as training leaves it: replies are made with a KV cache anyway",
            stacklevel=5,  # what called `from_pretrained`
        )
    for config in configs:
        if getattr(config, "use_cache", None) is False:
            config.use_cache = True


@dataclass(frozen=True)
class Generation:
    """One call of `generate`: `prompts` of `tokens` each, and the `config` it goes by; `kwargs` are the call's.

    `sequences` go on at once. `tokens` are 0 where no tensor was given.
    """

    prompts: int
    tokens: int
    sequences: int
    config: Any
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generation:
        """What `model.generate(*args, **kwargs)` is about to do."""
        given = next((kwargs[name] for name in ("inputs", "input_ids", "inputs_embeds") if name in kwargs), None)
        given = args[0] if given is None and args else given
        config = deepcopy(kwargs.get("generation_config") or model.generation_config)
        config.update(**{name: value for name, value in kwargs.items() if hasattr(config, name)})
        rows, tokens = given.shape[:2] if isinstance(given, torch.Tensor) else (0, 0)
        copies = max(config.num_beams or 1, config.num_return_sequences or 1)
        return cls(rows, tokens, rows * copies, config, kwargs)

    def check(self, plan: Plan) -> None:
        """Raises ContextError if prompts and replies may need more KV cache than there is, or a longer pass."""
        if self.tokens == 0:
            return
        length, sequences = self._longest(), self.sequences
        if sequences * length > plan.context:
            before = f", {self._earlier} before it" if self._earlier else ""
            raise ContextError(
                f"a prompt of {self.tokens} tokens{before} and a reply make up to {length}, {sequences} at once: "
                f"{sequences * length} tokens of KV cache, and there is room for {plan.context}: "
                "lower max_new_tokens, or raise --context"
            )
        if self.config.use_cache is False and sequences * (length - 1) > plan.chunk:
            raise ContextError(
                f"without a KV cache (use_cache=False) every token is read with all before it, up to "
                f"{sequences * (length - 1)} tokens in one pass, and the workspace has room for {plan.chunk}: "
                "let it use one, or raise the memory budget"
            )

    def _longest(self) -> int:
        """Tokens of a sequence in the end, those that a given KV cache has already among them."""
        config = self.config
        if config.max_new_tokens is not None:
            return int(self._earlier + self.tokens + config.max_new_tokens)
        # What transformers makes when nobody says how many.
        return int(self._earlier + (config.max_length or self.tokens + 20))

    @property
    def _earlier(self) -> int:
        """Tokens before the prompt, which the mask of one that goes on with a KV cache tells."""
        mask = self.kwargs.get("attention_mask")
        return max(mask.shape[1] - self.tokens, 0) if isinstance(mask, torch.Tensor) and mask.dim() == 2 else 0

    def chunk(self, plan: Plan) -> int | None:
        """Tokens of each prompt that transformers is to read in a pass; None where it need not cut the prompt.

        It has to where a pass cannot be cut later: the masks for a static KV cache are made before, and so are images.
        """
        cache, asked = self.kwargs.get("past_key_values"), self.config.prefill_chunk_size
        whole = (
            self.config.cache_implementation in ALL_STATIC_CACHE_IMPLEMENTATIONS
            or (cache is not None and cache.is_compileable)
            or any(self.kwargs.get(name) is not None for name in MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL)
        )
        longest = min(asked or self.tokens, max(plan.chunk // max(self.sequences, 1), 1))
        return longest if whole and self.tokens > longest else None

    def arguments(self, plan: Plan) -> dict[str, Any]:
        """The keyword arguments for transformers."""
        chunk = self.chunk(plan)
        same = chunk == self.config.prefill_chunk_size
        return self.kwargs if same else self.kwargs | {"prefill_chunk_size": chunk}
