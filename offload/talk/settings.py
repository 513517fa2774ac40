"""What `generate` is told for one reply, and whose fault it is if it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from cache.errors import ModelError, OffloadError
from offload.options import SamplingOptions
from offload.system.text import summary
from offload.system.whose import calls

_ONE = ("num_beams", "num_return_sequences")
_MOVED = ("num_beam_groups", "diversity_penalty", "constraints", "force_words_ids", "penalty_alpha", "dola_layers")
_CACHES = (None, "dynamic", "dynamic_full", "static", "sliding_window", "hybrid", "hybrid_chunked")
_MORE = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")


def generate_one(
    model: Any,
    prompt: Sequence[int],
    sampling: SamplingOptions,
    limit: int,
    stop: Callable[..., torch.Tensor],
    streamer: BaseStreamer | None = None,
) -> list[int]:
    """`prompt` (token ids) and a reply of up to `limit` tokens, which ends where the criterion `stop` says so.

    Raises ModelError where the model's settings are at fault, and what the model raises. Warns as `settled` does.
    """
    told = settled(model) | sampling_arguments(sampling)
    ids = torch.tensor([list(prompt)], device=model.device)
    with checked():
        found: list[int] = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=limit,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([stop]),
            **told,
        )[0].tolist()
    return found


def settled(model: Any) -> dict[str, Any]:
    """What `generate` is told for one streamed reply, whatever the model's settings; warns of what that takes away."""
    config = model.generation_config
    told: dict[str, Any] = dict.fromkeys(_MORE, False)

    def change(name: str, value: Any, why: str) -> None:
        warnings.warn(f"generation_config.json: {name} is {getattr(config, name)}: {why}", stacklevel=3)
        told[name] = value

    for name in _ONE:
        if (getattr(config, name, None) or 1) != 1:
            change(name, 1, "a reply is one, and streamed")
    for name in _MOVED:
        if getattr(config, name, None):
            change(name, None, "transformers does not decode so without code from the hub")
    if config.cache_implementation not in _CACHES:
        change("cache_implementation", None, "the plain KV cache is taken")
    if config.stop_strings and model.tokenizer is None:
        change("stop_strings", None, "they need a tokenizer")
    elif config.stop_strings:
        told["tokenizer"] = model.tokenizer
    if getattr(config, "token_healing", False):
        change("token_healing", False, "prompts are left as they are")
    return told


def sampling_arguments(sampling: SamplingOptions) -> dict[str, Any]:
    """What `generate` is told for `sampling`, without the seed and the limit."""
    if sampling.temperature == 0:
        return {"do_sample": False}
    asked = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    chosen = {name: value for name, value in asked.items() if value is not None}
    return {"do_sample": True, **chosen} if chosen else {}


@contextmanager
def checked() -> Iterator[None]:
    """Around `generate`: raises ModelError where its settings are what it fails at, and not the model."""
    try:
        yield
    except (OffloadError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        known = [call for call in calls(error) if call.ours or call.module.startswith("transformers.")]
        if not known[-1].module.startswith("transformers.generation."):
            raise
        raise ModelError(
            f"generation_config.json and the flags ask for what cannot be generated ({summary(error)})"
        ) from error
