"""What is decided about a prompt before `generate` reads it: whether it fits, and who cuts it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from cache.errors import ContextError
from offload.assembly.cutting import given_tokens
from offload.plan.budgets import Plan

_BY_POSITION = [
    name
    for name, parameter in inspect.signature(GenerationMixin.generate).parameters.items()
    if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name != "self"
]


def with_cache(module: Any) -> None:
    """Lets `module` keep a KV cache where its checkpoint says that it does not, with a warning.

    Training with gradient checkpointing leaves `use_cache: false` in a configuration. A reply needs the cache: without,
    every token is read with all before it, for which the plan has no room.
    """
    configs = (module.config, module.config.get_text_config(), module.generation_config)
    without = [config for config in configs if getattr(config, "use_cache", None) is False]
    if without:
        warnings.warn(
            "the checkpoint says use_cache: false, as training leaves it: replies are made with a KV cache anyway",
            stacklevel=5,  # what called `from_pretrained`
        )
    for config in without:
        config.use_cache = True


@dataclass(frozen=True)
class Generation:
    """One call of `generate`: `prompts` of `tokens` each, and the `config` it goes by; `given` is all it was told.

    `sequences` go on at once, in `caches` KV caches each. `tokens` are 0 where there is no prompt of any sense: what
    is wrong with a call is transformers' to say.
    """

    prompts: int
    tokens: int
    sequences: int
    caches: int
    config: GenerationConfig
    given: dict[str, Any]

    @classmethod
    def of(cls, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generation:
        """What `model.generate(*args, **kwargs)` is about to do."""
        given = dict(zip(_BY_POSITION, args, strict=False)) | kwargs
        asked, own = given.get("generation_config"), model.generation_config
        config = deepcopy(asked if isinstance(asked, GenerationConfig) else own)
        config.update(**own.to_dict(), defaults_only=True, allow_custom_entries=True)
        config.update(**{name: value for name, value in given.items() if hasattr(config, name)})
        rows, tokens = _prompt(given)
        sequences = rows * max(_whole(config.num_beams) or 1, _whole(config.num_return_sequences) or 1)
        caches = 2 if given.get("assistant_model") is model else 1
        return cls(rows, tokens, sequences, caches, config, given)

    def check(self, plan: Plan) -> None:
        """Raises ContextError if prompts and replies may need more KV cache than there is, or a longer pass."""
        if self.tokens == 0:
            return
        length, sequences = self._longest(), self.sequences
        if sequences * self.caches * length > plan.context:
            before = f", {self._earlier} before it" if self._earlier else ""
            assistant = " and as many for the assistant, which is the model itself" if self.caches > 1 else ""
            raise ContextError(
                f"a prompt of {self.tokens} tokens{before} and a reply make up to {length}, {sequences} at once"
                f"{assistant}: {sequences * self.caches * length} tokens of KV cache, and there is room for "
                f"{plan.context}: lower max_new_tokens, or raise --context"
            )
        if self.config.use_cache is False and sequences * (length - 1) > plan.chunk:
            raise ContextError(
                f"without a KV cache (use_cache=False) every token is read with all before it, up to "
                f"{sequences * (length - 1)} tokens in one pass, and the workspace has room for {plan.chunk}: "
                "let it use one, or raise the memory budget"
            )

    def _longest(self) -> int:
        """Tokens of a sequence in the end, those that a given KV cache has already among them."""
        new, length = _whole(self.config.max_new_tokens), _whole(self.config.max_length)
        if new is not None:
            return self._earlier + self.tokens + new
        # What transformers makes when nobody says how many.
        return self._earlier + (length or self.tokens + 20)

    @property
    def _earlier(self) -> int:
        """Tokens before the prompt: the mask of one that goes on with a KV cache tells."""
        mask, cache = self.given.get("attention_mask"), self.given.get("past_key_values")
        if not isinstance(cache, Cache) or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return 0
        return max(mask.shape[1] - self.tokens, 0)

    @property
    def read(self) -> int | None:
        """Tokens of each prompt and of what came before it, after which replies go on; None if nobody can tell."""
        return self._earlier + self.tokens or None

    @property
    def longest_pass(self) -> int | None:
        """Tokens of each prompt that the caller wants in a pass, at most; None if it does not say."""
        return _whole(self.config.prefill_chunk_size)

    def chunk(self, plan: Plan) -> int | None:
        """Tokens of each prompt that transformers is to read in a pass; None where it need not cut the prompt.

        It has to where a pass cannot be cut later: the masks for a static KV cache are made before, and so are images.
        """
        whole = (
            self.config.cache_implementation in ALL_STATIC_CACHE_IMPLEMENTATIONS
            or getattr(self.given.get("past_key_values"), "is_compileable", False)
            or any(self.given.get(name) is not None for name in MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL)
        )
        longest = min(self.longest_pass or self.tokens, max(plan.chunk // max(self.sequences, 1), 1))
        return longest if whole and self.tokens > longest else None

    def changes(self, plan: Plan) -> dict[str, Any]:
        """What transformers is told otherwise than the caller said; nothing where it will refuse what was said."""
        asked, chunk = self.config.prefill_chunk_size, self.chunk(plan)
        refused = asked is not None and (self.longest_pass is None or self.config.use_cache is False)
        return {} if refused or asked == chunk else {"prefill_chunk_size": chunk}


def _prompt(given: Mapping[str, Any]) -> tuple[int, int]:
    """How many prompts there are, and the tokens of each; zeros for what is none."""
    ids = given.get("inputs") if given.get("inputs") is not None else given.get("input_ids")
    embeds = given.get("inputs_embeds")
    if ids is None and embeds is None:
        return 1, 1  # the token that begins a text
    tokens = given_tokens({"input_ids": None if embeds is not None else ids, "inputs_embeds": embeds})
    return (0, 0) if tokens is None else (tokens.shape[0], tokens.shape[1])


def _whole(value: Any) -> int | None:
    """A number above 0; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
