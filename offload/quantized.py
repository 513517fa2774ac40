"""Checkpoints that come quantised: which ones are read, and how one tensor's numbers come back.

transformers' quantizers know which tensors of FP8 blocks and of MXFP4 belong together, and their own steps make numbers
of them, so that the result is theirs to the bit. A step makes several float32 copies of what it is given; here it gets
a band of rows at a time. bitsandbytes' 4-bit weights say by their names what belongs to them.

The model in memory is a plain one: its configuration says nothing of how the checkpoint was stored.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import Mxfp4Dequantize
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from cache.errors import CheckpointError, UnsupportedFamilyError
from offload.shards import TensorInfo

PLAIN = frozenset({"F64", "F32", "F16", "BF16"})
"""Types whose values are the weights themselves."""

_BY_QUANTIZER = ("fp8", "mxfp8", "mxfp4")
_BITSANDBYTES = "bitsandbytes 4-bit"
_BAND_NUMBERS = 2**20  # fits in a core's cache, and is enough to make the steps' overhead small
_BYTES_PER_NUMBER = 12  # what transformers' steps hold of a band: two float32 copies, one in the model's type, indices


def take_quantizer(config: Any, name: str) -> Any:
    """transformers' quantizer for the checkpoint `name`, set to dequantise; None where it takes none.

    Side effect: `config` forgets that the checkpoint is quantised. Raises UnsupportedFamilyError for a method that is
    not read, CheckpointError for a configuration that cannot be.
    """
    said = None
    for holder in (config, config.get_text_config()):
        said = vars(holder).pop("quantization_config", None) or said
    if not said:
        return None
    said = said if isinstance(said, dict) else said.to_dict()
    method = _method(said)
    if method == _BITSANDBYTES:
        return None
    if method not in _BY_QUANTIZER:
        raise UnsupportedFamilyError(
            f"{name} is stored in a quantised format that is not read ({method}): use its bf16, FP8, MXFP4 or "
            "bitsandbytes 4-bit checkpoint, with --experts nf4 if it is to be small in memory"
        )
    try:
        return AutoHfQuantizer.from_config(AutoQuantizationConfig.from_dict({**said, "dequantize": True}))
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{name}: quantization_config in config.json cannot be read: {error}") from error


def _method(said: Mapping[str, Any]) -> str:
    if said.get("load_in_4bit"):
        return _BITSANDBYTES
    if said.get("load_in_8bit"):
        return "bitsandbytes 8-bit"
    method = said.get("quant_method", "unknown")
    return str(getattr(method, "value", method))


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A dense weight that is quantised on disk: what it is made of there, and what makes numbers of these tensors."""

    parts: tuple[TensorInfo, ...]
    unpack: Callable[[Sequence[torch.Tensor]], torch.Tensor]


def is_dequantization(operation: Any) -> bool:
    """Whether this step of a conversion turns quantised tensors and their scales into numbers, each pair by itself."""
    return isinstance(operation, (Fp8Dequantize, Mxfp4Dequantize))


def is_scale(pattern: str) -> bool:
    """Whether this pattern of a conversion is of scales."""
    return pattern.endswith(("_scale_inv", "_scales"))


def scale_of(pattern: str) -> str:
    """The pattern of the scales of what `pattern` is of."""
    stem = pattern.removesuffix("_blocks")
    return f"{pattern}_scale_inv" if stem == pattern else f"{stem}_scales"


def dequantize(operation: Any, tensors: Mapping[str, list[torch.Tensor]], target: str, model: Any) -> dict[str, Any]:
    """What `operation` makes of `tensors`, by pattern: scales are gone, what has none is left as it is."""
    return {
        pattern: [
            dequantize_one(operation, pattern, weight, scale, target, model)
            for weight, scale in zip(weights, tensors[scale_of(pattern)], strict=True)
        ]
        if scale_of(pattern) in tensors
        else weights
        for pattern, weights in tensors.items()
        if not is_scale(pattern)
    }


def dequantize_one(
    operation: Any, pattern: str, weight: torch.Tensor, scale: torch.Tensor, target: str, model: Any
) -> torch.Tensor:
    """One tensor's numbers, in the type that `target` has in `model`. Raises ValueError for scales of another shape."""
    shape = _whole_blocks(operation, weight.shape, scale.shape)
    if shape != weight.shape:
        whole = weight.new_zeros(shape)
        whole[..., : weight.shape[-2], : weight.shape[-1]] = weight
        numbers = dequantize_one(operation, pattern, whole, scale, target, model)
        return numbers[..., : weight.shape[-2], : weight.shape[-1]].contiguous()
    bands = _Bands.of(pattern, weight.shape, scale.shape)
    packed = isinstance(operation, Mxfp4Dequantize)
    names = (pattern, scale_of(pattern)) if packed else ("weight", "weight_scale_inv")
    joined = -1 if packed else -2  # an MXFP4 matrix comes out transposed
    result = weight.new_empty(0)
    # Without data there is nothing to save.
    step = bands.rows if weight.is_meta else bands.step
    for start in range(0, bands.rows, step):
        count = min(step, bands.rows - start)
        rows = weight.narrow(bands.axis, start, count)
        scales = scale.narrow(-2, start // bands.unit, count // bands.unit) if bands.unit else scale
        tensors = dict(zip(names, (rows, scales), strict=True))
        (band,) = operation.convert(tensors, full_layer_name=target, model=model).values()
        if start == 0:
            result = band.new_empty([bands.rows if i == band.dim() + joined else n for i, n in enumerate(band.shape)])
        result.narrow(joined, start, count).copy_(band)
    return result


def work_bytes(operation: Any, pattern: str, weight: Sequence[int], scale: Sequence[int]) -> int:
    """Bytes that `dequantize_one` takes besides its result, from the shapes of a weight and its scales.

    Raises ValueError for shapes that do not belong together.
    """
    shape = _whole_blocks(operation, weight, scale)
    bands = _Bands.of(pattern, shape, scale)
    copies = 0 if tuple(shape) == tuple(weight) else 9 * math.prod(shape)  # the weight, and its numbers in any type
    return copies + _BYTES_PER_NUMBER * min(bands.step, bands.rows) * bands.numbers_per_row


def _whole_blocks(operation: Any, weight: Sequence[int], scale: Sequence[int]) -> Sequence[int]:
    """The shape of a weight with the blocks at its edges filled up, where they are not whole.

    From the shapes alone transformers' step would conclude that all blocks are somewhat smaller.
    """
    config = getattr(getattr(operation, "hf_quantizer", None), "quantization_config", None)
    block = getattr(config, "weight_block_size", None)
    if block is None or len(weight) < 2 or len(scale) < 2:
        return weight
    *outer, rows, columns = weight
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    if tuple(scale[-2:]) != grid or (rows % block[0] == 0 and columns % block[1] == 0):
        return weight
    return torch.Size((*outer, grid[0] * block[0], grid[1] * block[1]))


@dataclass(frozen=True, slots=True)
class _Bands:
    """How a weight is cut: `step` rows at a time along `axis`; `unit` rows share a row of scales, 0 if all do."""

    axis: int
    rows: int
    unit: int
    step: int
    numbers_per_row: int

    @classmethod
    def of(cls, pattern: str, weight: Sequence[int], scale: Sequence[int]) -> _Bands:
        axis = len(weight) - (3 if pattern.endswith("_blocks") else 2)
        rows = weight[axis] if axis >= 0 else 0
        groups = scale[-2] if len(scale) >= 2 else 1
        if not rows or not groups or rows % groups:
            raise ValueError(f"it has the shape {list(weight)}, its scales have {list(scale)}")
        unit = rows // groups if groups > 1 else 0
        numbers = 2 * math.prod(weight) // rows  # a byte is two numbers at most
        least = max(unit, 1)
        return cls(axis, rows, unit, least * max(1, _BAND_NUMBERS // (least * max(numbers, 1))), numbers)


_PART_OF_4BIT = re.compile(r"(.+)\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)")


def bitsandbytes_parts(names: Collection[str]) -> dict[str, list[str]]:
    """Weight -> what else bitsandbytes saved of it, for every 4-bit weight among the tensors' `names`."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if match := _PART_OF_4BIT.fullmatch(name):
            found[match[1]].append(name)
    return {
        weight: parts
        for weight, parts in found.items()
        if weight in names and any(".quant_state.bitsandbytes__" in part for part in parts)
    }


def unpack_bitsandbytes(names: Sequence[str], dtype: torch.dtype, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A 4-bit weight's numbers from its `tensors`, the weight first; `names` are those on disk."""
    from offload.formats.nf4 import bitsandbytes  # takes a while to import, and few need it

    library = bitsandbytes()
    weight, *parts = tensors
    state = dict(zip((name.removeprefix(f"{names[0]}.") for name in names[1:]), parts, strict=True))
    unpacked: torch.Tensor = library.dequantize_4bit(weight, library.QuantState.from_dict(state, weight.device))
    return unpacked.to(dtype)
