"""generation_config.json as people write it: what others understand is mended with a warning, the rest refused.

Values that only `generate` can judge are left to it.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from cache.errors import CheckpointError
from offload.checkpoint.config.json_object import read_json_object

_NAME = "generation_config.json"
NUMBERS = {
    "temperature",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "length_penalty",
    "diversity_penalty",
    "guidance_scale",
    "penalty_alpha",
    "max_time",
}
"""Settings that may have a fraction."""
_WHOLE = {
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "num_beams",
    "num_beam_groups",
    "num_return_sequences",
    "top_k",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "num_assistant_tokens",
}
_TOKENS = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
}
_SWITCHES = {"do_sample", "use_cache", "renormalize_logits", "remove_invalid_values"}
_WORDS = {"true": True, "false": False}


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """What the checkpoint in `folder` says of generating; None if it says nothing.

    Raises CheckpointError; warns of what is not taken as it is written.
    """
    path = folder / _NAME
    if not path.is_file():
        return None
    content = read_json_object(path)
    try:
        return GenerationConfig(**_mended(content))
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: it cannot be used ({error})") from error


def _mended(content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, of the types that `generate` takes. Raises ValueError."""
    found = {name: _typed(name, value) for name, value in content.items()}

    def change(why: str, **new: Any) -> None:
        old = ", ".join(f"{name} is {json.dumps(content[name])}" for name in new)
        warnings.warn(f"{_NAME}: {old}: {why}", stacklevel=5)
        found.update(new)

    for name, value in found.items():
        said = content[name]
        if value is not said and (value != said or isinstance(said, bool)):  # NaN is not even itself, True is 1
            change(f"taken as {json.dumps(value)}", **{name: value})
    temperature = found.get("temperature")
    if temperature is not None and temperature < 0:
        raise ValueError(f"temperature is {temperature}, and must be 0 or more")
    if temperature == 0:
        change("the likeliest token is always taken", temperature=None)
        found["do_sample"] = False
    if (found.get("top_k") or 0) < 0:
        change("all tokens may be taken", top_k=0)
    for name in ("max_new_tokens", "prefill_chunk_size"):
        if found.get(name) is not None and found[name] <= 0:
            change("there is no such limit", **{name: None})
    if found.get("compile_config") is not None:
        change("nothing is compiled here", compile_config=None)
    return found


def _typed(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in _SWITCHES:
        return _WORDS.get(value.lower(), value) if isinstance(value, str) else value
    if name in _TOKENS:
        return [_whole(name, each) for each in value] if isinstance(value, list) else _whole(name, value)
    if name in _WHOLE:
        return _whole(name, value)
    return _number(name, value) if name in NUMBERS else value


def _whole(name: str, value: Any) -> int:
    found = _number(name, value, "whole number")
    if not found.is_integer():
        raise ValueError(f"{name} is {json.dumps(value)}, which is no whole number")
    return int(found)


def _number(name: str, value: Any, kind: str = "number") -> float:
    """A number, which may be written as text. Raises ValueError."""
    try:
        found = float(value)
    except (ValueError, TypeError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{name} is {json.dumps(value)}, which is no {kind}")
    return found
