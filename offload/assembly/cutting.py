"""One pass as several: what is longer than the workspace allows is read in chunks, over one KV cache.

transformers cuts the prompt of plain sampling and of beams if it is told to, and no other pass: not the first one of
prompt lookup or with an assistant, not embeddings, not a text that Phi-3.5-MoE reads anew once its positions change.
So any pass of `generate` is cut here. What chunks do not carry over by themselves is in `layers/across_passes.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from cache.errors import ContextError
from offload.layers.across_passes import Carried
from offload.plan.footprint import CHUNKS

_CUT = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
Run = Callable[[dict[str, Any], torch.Tensor, int], Any]
"""One forward pass: its arguments, the tokens among them, and how many the KV cache has."""


def given_tokens(given: Mapping[str, Any]) -> torch.Tensor | None:
    """What a pass reads: ids [rows, tokens] or vectors [rows, tokens, H]; None where it was given neither."""
    for name, dims in (("input_ids", 2), ("inputs_embeds", 3)):
        value = given.get(name)
        if isinstance(value, torch.Tensor) and value.dim() >= dims:
            return value
    return None


def read_in_chunks(
    run: Run, given: dict[str, Any], tokens: torch.Tensor, length: int, longest: int, carried: Carried, *, asked: bool
) -> Any:
    """What `run` gives for the arguments `given`, in passes of at most `longest` tokens of all rows together.

    `asked`: the caller wants them no longer, by `prefill_chunk_size`.
    Gives the last chunk's output, with the logits and hidden states of all. Raises ContextError for what cannot be cut.
    """
    rows, new = tokens.shape[:2]
    a_chunk = longest // rows
    reason = _never_cut(given, new) or _too_short(given, new, a_chunk, carried)
    if reason:
        raise ContextError(
            f"{rows} x {new} tokens have to be read in one pass, and the longest has {longest}: {reason}: give fewer "
            "at a time"
            + (", or raise the memory budget" if rows * new <= CHUNKS[0] else "")
            + (", or leave out prefill_chunk_size" if asked else "")
        )
    positions = given.get("position_ids")
    carried.read_up_to(length + new - 1 if positions is None else int(positions.max()))
    try:
        return _read(run, given, tokens, length, a_chunk)
    finally:
        carried.read_up_to(None)


def _read(run: Run, given: dict[str, Any], tokens: torch.Tensor, length: int, a_chunk: int) -> Any:
    new = tokens.shape[1]
    kept = given.get("logits_to_keep") or new  # 0: all
    cache, logits, hidden = given.get("past_key_values"), [], []
    recording = [layer for layer in _layers(cache) if getattr(layer, "record_past", False)]
    if length == 0:
        _declare_prompt(cache, new)
    for start in range(0, new, a_chunk):
        end = min(start + a_chunk, new)
        # Only what an assistant's guesses are taken back from has to be kept; windows would hold the whole prompt.
        for layer in recording:
            layer.record_past = end > new - kept
        chunk = _chunk(given, start, end, new, kept) | {"past_key_values": cache}
        output = run(chunk, tokens[:, start:end], length + start)
        cache = output.past_key_values
        if end > new - kept:
            logits.append(output.logits)
        hidden.append(output.get("hidden_states"))
    output.logits = torch.cat(logits, 1)
    if hidden[0] is not None:
        output.hidden_states = tuple(torch.cat(layer, 1) for layer in zip(*hidden, strict=True))
    return output


def _chunk(given: dict[str, Any], start: int, end: int, new: int, kept: int) -> dict[str, Any]:
    """The arguments for the tokens from `start` to `end` of the `new` ones, of which the last `kept` have logits."""
    chunk = dict(given)
    for name in ("input_ids", "inputs_embeds"):
        if chunk.get(name) is not None:
            chunk[name] = chunk[name][:, start:end]
    if chunk.get("attention_mask") is not None:
        mask = chunk["attention_mask"]
        chunk["attention_mask"] = mask[:, : mask.shape[1] - new + end]
    if chunk.get("position_ids") is not None:
        chunk["position_ids"] = chunk["position_ids"][..., start:end]
    if "logits_to_keep" in chunk:
        chunk["logits_to_keep"] = max(end - max(start, new - kept), 1)  # 0 would be all
    return chunk


def _declare_prompt(cache: Any, new: int) -> None:
    """Tells layers that keep a prompt for ever, beside a window of the reply, how much of what comes is the prompt."""
    for layer in _layers(cache):
        if hasattr(layer, "set_prefill_length"):
            layer.set_prefill_length(new)


def _layers(cache: Any) -> list[Any]:
    return [] if cache is None else list(cache.layers)


def _never_cut(given: dict[str, Any], new: int) -> str | None:
    """Why a pass with these arguments cannot be cut, whatever the lengths."""
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if given.get("use_cache") is False:
        return "without a KV cache (use_cache=False) every token is read with all before it"
    if given.get("output_attentions"):
        return "output_attentions has no form for attentions of several passes"
    if isinstance(mask, dict) or (mask is not None and mask.dim() != 2):
        return "its attention mask is made for one pass"
    if positions is not None and positions.shape[-1] != new:
        return "its position_ids are not one for each token"
    for name, value in given.items():
        if name not in _CUT and (isinstance(value, torch.Tensor) or (isinstance(value, dict) and value)):
            return f"{name} belongs to the whole of it"
    return None


def _too_short(given: dict[str, Any], new: int, a_chunk: int, carried: Carried) -> str | None:
    """Why chunks of `a_chunk` tokens will not do."""
    if a_chunk == 0:
        return "not one token of each goes into a pass"
    mask = given.get("attention_mask")
    padded = mask is not None and not bool(mask[:, -new:].all())
    if a_chunk == 1 and padded and carried.recurrent:
        return "read one by one, padding would go into the model's recurrent states"
    return None
