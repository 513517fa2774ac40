"""Checkpoints that come quantised: which ones are read, and how one tensor's numbers come back.

transformers' quantizers know which tensors of FP8 blocks and of MXFP4 belong together. What their steps would make of
them is computed here, to the bit: the same products, but a band of rows at a time instead of several float32 copies of
a whole matrix, and ten times as fast. bitsandbytes' 4-bit weights say by their names what belongs to them.

The model in memory is a plain one: its configuration says nothing of how the checkpoint was stored.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import FP4_VALUES, Mxfp4Dequantize
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from cache.errors import CheckpointError, UnsupportedFamilyError
from offload.checkpoint.shards import TensorInfo

PLAIN = frozenset({"F64", "F32", "F16", "BF16"})
"""Types whose values are the weights themselves."""

_BY_QUANTIZER = ("fp8", "mxfp8", "mxfp4")
_BITSANDBYTES = "bitsandbytes 4-bit"
_BAND_NUMBERS = 2**18  # fits in a core's cache, and is enough to make the overhead of a few operations small
_BYTES_PER_NUMBER = 16  # what is held of a band: indices, float32, the model's type


def take_quantizer(config: Any, name: str) -> Any:
    """transformers' quantizer for the checkpoint `name`, set to dequantise; None where it takes none.

    Side effect: `config` forgets that the checkpoint is quantised. Raises UnsupportedFamilyError for a method that is
    not read, CheckpointError for a configuration that cannot be.
    """
    said = None
    for holder in (config, config.get_text_config()):
        found = vars(holder).pop("quantization_config", None)
        said = said if found is None else found
    if said is None:
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
    method = str(getattr(method, "value", method))
    producer = said.get("producer")
    if method == "modelopt" or (isinstance(producer, dict) and producer.get("name") == "modelopt"):
        return f"{said.get('quant_algo', '')} by ModelOpt".strip()
    if method == "compressed-tensors" and "nvfp4" in str(said.get("format")):
        return "NVFP4 in compressed-tensors"
    return method


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A dense weight that is quantised on disk: what it is made of there, and what makes numbers of these tensors.

    `shape_is_inside`: whether only the bytes of a part say the weight's shape.
    """

    parts: tuple[TensorInfo, ...]
    unpack: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    shape_is_inside: bool = False


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


def dequantize(operation: Any, tensors: Mapping[str, list[torch.Tensor]], dtype: torch.dtype) -> dict[str, Any]:
    """What `operation` makes of `tensors`, by pattern: scales are gone, what has none is left as it is."""
    return {
        pattern: [
            dequantize_one(operation, weight, scale, dtype)
            for weight, scale in zip(weights, tensors[scale_of(pattern)], strict=True)
        ]
        if scale_of(pattern) in tensors
        else weights
        for pattern, weights in tensors.items()
        if not is_scale(pattern)
    }


def dequantize_one(operation: Any, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One tensor's numbers: float32 products of values and scales, rounded to `dtype`, as `operation` computes them.

    Raises ValueError for scales of another shape.
    """
    bands = _Bands.of(operation, weight.shape, scale.shape, numbers_per_byte(weight.dtype))
    transposed = isinstance(operation, Mxfp4Dequantize)
    weight = weight.flatten(-2) if transposed else weight
    edge = weight.shape
    if edge != bands.shape:
        whole = weight.new_zeros(bands.shape)
        whole[..., : edge[-2], : edge[-1]] = weight
        weight = whole
    *outer, rows, _ = bands.shape
    shape = (*outer, bands.columns, rows) if transposed else (*outer, rows, bands.columns)
    result = weight.new_empty(shape, dtype=dtype)
    by_rows = result.transpose(-1, -2) if transposed else result
    scale = _values_of_scales(scale).reshape(-1, bands.grid[0], 1, bands.grid[1], 1)
    step = rows if weight.is_meta else bands.step  # without data there is nothing to save
    for start in range(0, rows, step):
        count = min(step, rows - start)
        values = _values(weight.narrow(-2, start, count))
        scales = scale.narrow(1, start // bands.unit, count // bands.unit) if bands.unit else scale
        groups = scales.shape[1]
        values.view(-1, groups, count // groups, bands.grid[1], bands.columns // bands.grid[1]).mul_(scales)
        by_rows.narrow(-2, start, count).copy_(values.to(dtype))
    return result if edge == bands.shape else result[..., : edge[-2], : edge[-1]].contiguous()


def work_bytes(operation: Any, weight: Sequence[int], scale: Sequence[int], numbers: int) -> int:
    """Bytes that `dequantize_one` takes besides its result, from the shapes of a weight, of which a byte is so many
    `numbers`, and of its scales. Raises ValueError for shapes that do not belong together."""
    bands = _Bands.of(operation, weight, scale, numbers)
    filled_up = math.prod(bands.shape) != math.prod(weight)
    copies = 9 * math.prod(bands.shape) if filled_up else 0  # the weight, and its numbers in any type
    return copies + _BYTES_PER_NUMBER * min(bands.step, bands.shape[-2]) * bands.columns


def numbers_per_byte(dtype: torch.dtype) -> int:
    """How many numbers an element of a quantised weight is: integers are pairs of FP4 numbers."""
    return 1 if dtype.is_floating_point else 2


@dataclass(frozen=True, slots=True)
class _Bands:
    """How a weight is cut: `step` rows at a time. `shape` is its, with whole blocks and matrices of bytes; `columns`
    are numbers in a row, `grid` the scales of a matrix. `unit` rows share a row of scales, 0 if all do."""

    shape: tuple[int, ...]
    columns: int
    grid: tuple[int, int]
    unit: int
    step: int

    @classmethod
    def of(cls, operation: Any, weight: Sequence[int], scale: Sequence[int], numbers: int) -> _Bands:
        if isinstance(operation, Mxfp4Dequantize):
            fits = tuple(weight[:-1]) == tuple(scale) and len(scale) > 1
            shape = (*weight[:-2], math.prod(weight[-2:]))
        else:
            fits = len(weight) > 1
            shape = _whole_blocks(operation, weight, scale)
        rows, columns = (shape[-2], numbers * shape[-1]) if fits else (0, 0)
        grid = (scale[-2], scale[-1]) if len(scale) > 1 else (1, 1)
        if not rows or not columns or not all(grid) or rows % grid[0] or columns % grid[1]:
            raise ValueError(f"it has the shape {list(weight)}, its scales have {list(scale)}")
        unit = rows // grid[0] if grid[0] > 1 else 0
        least = max(unit, 1)
        return cls(shape, columns, grid, unit, least * max(1, _BAND_NUMBERS // (least * columns)))


def _whole_blocks(operation: Any, weight: Sequence[int], scale: Sequence[int]) -> tuple[int, ...]:
    """The shape of a weight with the blocks at its edges filled up, where they are not whole.

    From the shapes alone transformers' step would conclude that all blocks are somewhat smaller.
    """
    config = getattr(operation.hf_quantizer, "quantization_config", None)
    block = getattr(config, "weight_block_size", None)
    if block is None or len(weight) < 2 or len(scale) < 2:
        return tuple(weight)
    *outer, rows, columns = weight
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    return (*outer, grid[0] * block[0], grid[1] * block[1]) if tuple(scale[-2:]) == grid else tuple(weight)


def _values(packed: torch.Tensor) -> torch.Tensor:
    """What bytes stand for, float32: one number of FP8 each, or two of FP4, the low half first."""
    shape = (*packed.shape[:-1], numbers_per_byte(packed.dtype) * packed.shape[-1])
    if packed.is_meta:
        return packed.new_empty(shape, dtype=torch.float32)
    if packed.itemsize > 1:
        return packed.to(torch.float32, copy=True)
    # torch converts FP8 number by number, and indexes by a matrix as slowly: a vector of indices takes a tenth.
    table = _table(packed.dtype if packed.is_floating_point() else torch.uint8)
    return table.index_select(0, packed.reshape(-1).view(torch.uint8).int()).view(torch.float32).view(shape)


@functools.cache
def _table(dtype: torch.dtype) -> torch.Tensor:
    """The values of all bytes; of pairs of FP4 numbers as int64, two float32 each."""
    every = torch.arange(256, dtype=torch.uint8)
    if dtype != torch.uint8:
        return every.view(dtype).float()
    values = torch.tensor(FP4_VALUES)
    return torch.stack((values[(every & 15).long()], values[(every >> 4).long()]), -1).view(torch.int64).view(-1)


def _values_of_scales(scale: torch.Tensor) -> torch.Tensor:
    """float32; bytes are exponents."""
    return (scale.float() - 127.0).exp2() if scale.dtype == torch.uint8 else scale.float()


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
