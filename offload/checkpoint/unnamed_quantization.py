"""Quantised weights that config.json keeps silent about: known by the names and types of their tensors, and refused."""

from __future__ import annotations

from collections.abc import Iterable

from cache.errors import CheckpointError, UnsupportedFamilyError
from offload.checkpoint.dequantize import PLAIN
from offload.checkpoint.shards import ShardIndex

_NOT_READ = {
    ".weight_scale_2": "NVFP4, as ModelOpt writes it",
    ".weight_packed": "packed, as compressed-tensors writes it",
    ".qweight": "GPTQ or AWQ",
    ".SCB": "bitsandbytes 8-bit",
}
_SCALES = {"_scale_inv": "", "_scale": "", "_scales": "_blocks"}  # what a scale's name ends with, and its weight's


def check_plain(shards: ShardIndex, unmatched: Iterable[str]) -> None:
    """Refuse a checkpoint whose configuration says nothing of quantisation, where tensors `unmatched` by the model do.

    Raises UnsupportedFamilyError for a form that is not read, CheckpointError for scales that would be ignored.
    """
    unmatched = list(unmatched)
    for name in unmatched:
        form = next((form for ending, form in _NOT_READ.items() if name.endswith(ending)), None)
        if form is not None:
            raise UnsupportedFamilyError(
                f"{shards[name].file}: its weights are quantised in a form that is not read ({form}), as the name of "
                f"{name} says: use the model's bf16 checkpoint"
            )
    for name in unmatched:
        for ending, of_weight in _SCALES.items():
            weight = shards.get(name.removesuffix(ending) + of_weight) if name.endswith(ending) else None
            if weight is not None and weight.dtype not in PLAIN:
                raise CheckpointError(
                    f"{weight.file}: {weight.name} is {weight.dtype} with {name} beside it, and config.json has no "
                    "quantization_config that says how: copy config.json again from where the weights are from"
                )
