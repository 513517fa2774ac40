"""How fast a device computes with weights that come from memory: experts, and dense matrices, in every format.

An expert is computed by the function the runtime uses, with the format's own kernels. Each run takes other weights, so
many of them that the processor's caches have forgotten a weight when its turn comes again: a large model's weights come
from memory. What the weights say does not matter to the time they take, so all formats share one block of memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers.integrations.moe import _default_apply_gate

from offload.checkpoint.parameter import align
from offload.costs.precision import NESTED
from offload.device.base import Device
from offload.engine.outputs import compute_expert
from offload.formats import Field, Format
from offload.formats.precision import PLAIN, form_of
from offload.layers.products import Products
from offload.machine.budget import UNLIMITED, Budget
from offload.machine.products import Product
from offload.machine.threads import torch_threads
from offload.plan.work import SMALL_EXPERT_BYTES
from offload.store.base import Weights
from offload.store.record import RAW, Shape, StoredMatrix
from offload.system.memory import available_bytes

FORMATS = ("bf16", "nf4", "int8", "int4", "fp32", "int2", "int3")  # what plans use most comes first
DENSE_FORMATS = ("bf16", "nf4", "int8", "fp32")
EXPERTS: Mapping[tuple[int, int], Sequence[int]] = {
    (576, 64): (1, 8, 128),
    (2048, 768): (1, 2, 8, 32, 128, 512),
    (2880, 2880): (1, 8, 128),
}
"""Tokens by shape (hidden, intermediate): those of the demo, of Qwen3-30B-A3B, of gpt-oss-20b."""
DENSE_SHAPE = (2048, 4096)  # inputs, outputs: a query projection of Qwen3-30B-A3B
DENSE_TOKENS = (1, 8, 32, 128, 512)
_LARGEST_BYTES = max(3 * 4 * hidden * intermediate for hidden, intermediate in EXPERTS)
_ROUNDS_OF_CACHE = 2
_UNKNOWN_CACHE_BYTES = 64 * 2**20
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_TILE_BYTES = 2**24
_DEFAULT = Products(exact=False)
_PACKING_S = 0.05


class ExpertModule:
    """What `compute_expert` asks of an experts module, in the commonest design: gate and up fused, no bias."""

    has_gate, has_bias, is_transposed, has_post_expert_norm = True, False, False, False
    act_fn = nn.SiLU()
    _apply_gate = _default_apply_gate


def weight_block(device: Device, nbytes: int | None = None) -> torch.Tensor:
    """Memory of `device` (uint8) that weights of any format can be cut from, larger than the processor's cache.

    As bfloat16 or float32 it holds numbers like weights: zeros and denormal numbers take other times.
    """
    if nbytes is None:
        wanted = min(_ROUNDS_OF_CACHE * last_cache_bytes(), available_bytes() // 4)
        nbytes = max(wanted, _LARGEST_BYTES)
    (block,) = device.allocate(1, align(nbytes))
    tile = torch.empty(_TILE_BYTES // 2, dtype=torch.bfloat16)
    tile = tile.uniform_(-0.05, 0.05, generator=torch.Generator().manual_seed(0)).view(torch.uint8)
    for part in block.split(_TILE_BYTES):
        part.copy_(tile[: len(part)])
    return block


class ComputeProbe:
    """Computations on `device`, with `threads` threads where it is the CPU, with weights cut from `block`.

    The CPU multiplies as `products` say: by default as a model does where no option says otherwise.
    """

    def __init__(self, device: Device, threads: int, block: torch.Tensor, products: Products = _DEFAULT) -> None:
        self.device = device
        self.threads = threads
        self.block = block
        self.products = products

    def expert(self, format: str, shape: tuple[int, int], tokens: Sequence[int]) -> Product:
        """One expert of `shape` (hidden, intermediate), to be timed by tokens."""
        nbytes = self._bytes(format, _expert_shapes(shape).values())
        threads = 1 if nbytes < SMALL_EXPERT_BYTES else self.threads
        return Product(format, shape, nbytes, threads, tokens, self.expert_call(format, shape), self.device)

    def dense(self, format: str, shape: tuple[int, int], tokens: Sequence[int]) -> Product:
        """One dense matrix of `shape` (inputs, outputs), to be timed by tokens."""
        matrix = Shape(shape[1], shape[0], transposed=False)
        rotation = itertools.cycle(self._matrices(format, {"weight": matrix}))

        def product(x: torch.Tensor) -> torch.Tensor:
            weight = next(rotation)["weight"]
            return torch.nn.functional.linear(x, weight) if isinstance(weight, torch.Tensor) else weight.linear(x)

        call = self._call(format, shape[0], product)
        nbytes = self._bytes(format, [matrix])
        return Product(format, shape, nbytes, self.threads, tokens, call, self.device)

    def expert_call(self, format: str, shape: tuple[int, int]) -> Callable[[int], object]:
        """A function that computes one expert for some tokens, another expert each time, and waits for the result."""
        module = ExpertModule()
        rotation = itertools.cycle(self._matrices(format, _expert_shapes(shape)))
        return self._call(format, shape[0], lambda x: compute_expert(module, x, next(rotation)))

    def packing_bytes_per_s(self, format: str, shape: tuple[int, int], budget: Budget = UNLIMITED) -> float | None:
        """How fast one thread packs records of such experts for this device; None if they are computed as stored."""
        form, level = _form(format)
        actions, nbytes = list[Callable[[], object]](), 0
        for matrix in _expert_shapes(shape).values():
            packed = None
            if isinstance(form, Format):
                packed = form.packed(matrix.n, matrix.k, level, self.device.torch_device.type)
            if packed is None or not isinstance(form, Format):
                return None
            stored = form.stored(matrix.n, matrix.k, level)
            nbytes += sum(field.nbytes for field in stored)
            out = {field.name: torch.empty(field.shape, dtype=field.dtype) for field in packed}
            records = itertools.cycle(_cut(self.block, stored))
            actions.append(partial(_pack, form, records, matrix, level, out))
        with torch_threads(1):
            return nbytes / budget.median_s(lambda: [act() for act in actions], _PACKING_S)

    def _call(
        self, format: str, width: int, compute: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[int], object]:
        inputs: dict[int, torch.Tensor] = {}
        dtype = PLAIN.get(format, torch.bfloat16)

        @torch.no_grad()
        def call(tokens: int) -> None:
            if tokens not in inputs:
                inputs[tokens] = torch.ones(tokens, width, dtype=dtype, device=self.device.torch_device)
            compute(inputs[tokens])
            if (fence := self.device.fence()) is not None:
                fence.synchronize()

        return call

    def _bytes(self, format: str, shapes: Iterable[Shape]) -> int:
        return sum(align(field.nbytes) for shape in shapes for field in self._fields(format, shape))

    def _fields(self, format: str, shape: Shape) -> tuple[Field, ...]:
        """What a matrix consists of where it is computed."""
        form, level = _form(format)
        if not isinstance(form, Format):
            return (Field(RAW, form, (shape.n, shape.k)),)
        packed = form.packed(shape.n, shape.k, level, self.device.torch_device.type)
        return packed or form.stored(shape.n, shape.k, level)

    def _matrices(self, format: str, shapes: Mapping[str, Shape]) -> list[Weights]:
        """As many sets of matrices as the block has room for."""
        form, level = _form(format)
        fields = {name: self._fields(format, shape) for name, shape in shapes.items()}
        sets: list[Weights] = []
        for tensors in zip(*(_cut(part, fields[name]) for name, part in self._parts(fields)), strict=False):
            views = dict(zip(fields, tensors, strict=True))
            if isinstance(form, Format):
                weights: Weights = {name: StoredMatrix(form, views[name], shapes[name], level) for name in views}
            else:
                weights = {name: views[name][RAW] for name in views}
            if self.device.torch_device.type == "cpu":
                weights = self.products.of_expert(weights, transposed=False)
            sets.append(weights)
        return sets

    def _parts(self, fields: Mapping[str, Sequence[Field]]) -> Iterator[tuple[str, torch.Tensor]]:
        """A share of the block for each matrix, as large as it is."""
        sizes = {name: _set_bytes(each) for name, each in fields.items()}
        total, start = sum(sizes.values()), 0
        sets = max(len(self.block) // total, 1)
        for name, size in sizes.items():
            yield name, self.block[start : start + sets * size]
            start += sets * size


def _form(format: str) -> tuple[Format | torch.dtype, str]:
    level = NESTED[format] if format in ("int4", "int3", "int2") else format
    return form_of(level), level


def _expert_shapes(shape: tuple[int, int]) -> dict[str, Shape]:
    hidden, intermediate = shape
    return {
        "gate_up_proj": Shape(2 * intermediate, hidden, transposed=False),
        "down_proj": Shape(hidden, intermediate, transposed=False),
    }


def _set_bytes(fields: Iterable[Field]) -> int:
    return sum(align(field.nbytes) for field in fields)


def _cut(block: torch.Tensor, fields: Sequence[Field]) -> list[dict[str, torch.Tensor]]:
    """As many times these fields as `block` (uint8) has room for."""
    sets: list[dict[str, torch.Tensor]] = []
    for part in block.split(_set_bytes(fields)):
        views, at = {}, 0
        for field in fields:
            if at + field.nbytes > len(part):  # what is left at the end
                return sets
            views[field.name] = part[at : at + field.nbytes].view(field.dtype).view(field.shape)
            at += align(field.nbytes)
        sets.append(views)
    return sets


def _pack(
    form: Format,
    records: Iterator[Mapping[str, torch.Tensor]],
    shape: Shape,
    level: str,
    out: Mapping[str, torch.Tensor],
) -> None:
    form.pack(next(records), shape.n, shape.k, level, out)


def last_cache_bytes() -> int:
    """Bytes of the processor's largest cache; where the system does not say, 64 MiB, more than most have."""
    sizes = [int(file.read_text().strip().removesuffix("K")) * 1024 for file in _CACHES.glob("index*/size")]
    return max(sizes, default=_UNKNOWN_CACHE_BYTES)
