"""`--dense`: the linear layers that belong to no expert, stored and computed in a smaller format.

At batch 1 they are as many bytes as the experts used. What cannot be treated so stays as it is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cache.errors import FormatError
from offload.checkpoint.layout import ExpertMap
from offload.checkpoint.parameter import TORCH_DTYPES, align
from offload.device.arena import HostRegion
from offload.formats import FORMATS, Format
from offload.formats.bf16 import BF16
from offload.layers.autocast import cast, uncast
from offload.layers.router import router_beside
from offload.layers.source import class_code

DENSE_FORMATS: dict[str, Format] = {"bf16": BF16(), "int8": FORMATS["int8"], "nf4": FORMATS["nf4"]}

NUMBERS_AT_ONCE = 2**22
"""Of a matrix, how many numbers at most are quantised at once, or unpacked for a product: neither takes much memory."""


def parse_dense(text: str) -> Format | None:
    """The format that `--dense TEXT` names; None for "auto". Raises FormatError, saying what there is."""
    if text == "auto":
        return None
    if text not in DENSE_FORMATS:
        raise FormatError(f'--dense "{text}": choose one of auto, {", ".join(DENSE_FORMATS)}')
    return DENSE_FORMATS[text]


def parse_activations(text: str) -> bool:
    """Whether `--activations TEXT` rounds what products take in to 8 bits. Raises FormatError."""
    if text not in ("auto", "int8"):
        raise FormatError(f'--activations "{text}": choose one of auto, int8')
    return text == "int8"


class QuantisedLinear(nn.Module):
    """In place of `linear`: the same product, its matrix in `form`. The bias is a parameter as before.

    `weight` has a shape and a dtype, which some models ask for, and no numbers. Those are in `blocks` of rows, which
    have no memory of their own until transformers moves them off the meta device, and no meaning before `fill`.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, form: Format, device_type: str) -> None:
        super().__init__()
        self.in_features, self.out_features = k, n = linear.in_features, linear.out_features
        self.weight = torch.empty(n, k, dtype=linear.weight.dtype, device="meta")
        self.register_parameter("bias", linear.bias)
        rows = _rows_of_blocks(n, max(NUMBERS_AT_ONCE // k // 64, 1) * 64)
        self.blocks: Any = nn.ModuleList(
            _Rows(first, min(first + rows, n), k, form, device_type) for first in range(0, n, rows)
        )

    @property
    def own_rows(self) -> int:
        """Up to so many rows' products run on threads of our own."""
        rows: int = min(block.own_rows for block in self.blocks)
        return rows

    def fill(self, read: Callable[[int, int], torch.Tensor]) -> None:
        """Quantise the matrix; `read(first, last)` gives its rows from first to last (exclusive)."""
        for block in self.blocks:
            block.fill(read(block.first, block.last).to(self.weight.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., k] -> [..., n], in the dtype of x, or that of autocast."""
        rows = cast(x).reshape(-1, self.in_features)
        with uncast(rows):
            y = self._product(rows)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        if len(self.blocks) == 1:
            y: torch.Tensor = self.blocks[0](rows)
        elif len(rows) == 1 and not rows.is_meta:
            *others, last = self.blocks  # all but the last are of one shape
            if others[0].last == last.last - last.first:
                y = last.each(rows, list(self.blocks)).view(1, -1)
            else:
                y = torch.cat([others[0].each(rows, others).view(1, -1), last(rows)], dim=1)
        else:
            y = rows.new_empty(len(rows), self.out_features)
            for block in self.blocks:
                block.into(rows, y[:, block.first : block.last])
        return y

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _rows_of_blocks(n: int, most: int) -> int:
    """How many of n rows are a block: at most `most`, and fewer where all blocks are of one size then, which are
    computed in one call. Both are multiples of 64: what kernels want of n holds for blocks as for the whole."""
    even = (rows for rows in range(most, most // 2, -64) if n % rows == 0)
    return next(even, most)


class _Rows(nn.Module):
    """Rows first to last (exclusive) of a matrix. Its fields are buffers, and in no state dict."""

    def __init__(self, first: int, last: int, k: int, form: Format, device_type: str) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.form, self._shape, self._level = form, (last - first, k), form.levels[0]
        self._device_type = device_type
        self._packed = form.packed(*self._shape, self._level, device_type)
        for field in self._packed or form.stored(*self._shape, self._level):
            empty = torch.empty(field.shape, dtype=field.dtype, device="meta")
            self.register_buffer(field.name, empty, persistent=False)

    @property
    def fields(self) -> Any:
        """What the matrix consists of."""
        return self._buffers

    @property
    def own_rows(self) -> int:
        """Up to so many rows' products run on threads of our own."""
        return self.form.own_rows(*self._shape, self._level, self._device_type)

    def fill(self, weight: torch.Tensor) -> None:
        """Quantise `weight` [n, k]."""
        fields = self.form.encode(weight)
        if self._packed is not None:
            packed = {field.name: torch.empty(field.shape, dtype=field.dtype) for field in self._packed}
            self.form.pack(fields, *self._shape, self._level, packed)
            fields = packed
        for name, buffer in self._buffers.items():
            if buffer is not None:
                buffer.copy_(fields[name])

    def into(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Write what x [m, k] gives to `out` [m, n]."""
        if x.is_meta:
            out.copy_(self(x))
        else:
            self.form.linear_into(x, self.fields, *self._shape, self._level, out)

    def each(self, x: torch.Tensor, blocks: Sequence[_Rows]) -> torch.Tensor:
        """x [1, k] -> [len(blocks), n]: a row of each of `blocks`, which have this one's shape."""
        fields: Any = [block._buffers for block in blocks]
        return self.form.linear_each(x, fields, *self._shape, self._level)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [m, k] -> [m, n]."""
        n, k = self._shape
        if x.is_meta:
            # For the plan: the matrix, x and the product once more, at four bytes a number, is the most that a
            # format holds at once.
            unpacked = [x.new_empty(size, dtype=torch.float32) for size in ((n, k), (len(x), k), (len(x), n))]
            return x.new_empty(unpacked[-1].shape)
        # Every buffer is there; reading them one by one would take longer than small products.
        y: torch.Tensor = self.form.linear(x, self._buffers, n, k, self._level)  # type: ignore[arg-type]
        return y


@dataclass(frozen=True)
class DenseLinears:
    """Which linear layers of a model become quantised ones: by path, the `names` of the tensors on disk they are."""

    form: Format
    device_type: str
    names: Mapping[str, str]

    @classmethod
    def of(
        cls, model: nn.Module, experts: ExpertMap, dtype: torch.dtype, form: Format, device_type: str
    ) -> DenseLinears:
        """Those of `model` (a skeleton) that `form` makes smaller, and that nothing forbids.

        Routers and gates stay, as all that follows hangs on small differences there; so does what the family keeps at
        another dtype than `dtype`, shares its weight, is put together from several tensors on disk, or is not just
        called: some code multiplies by a layer's weight itself.
        """
        owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        routers = [router_beside(model, layer)[1] for layer in experts.layers]
        parts_of_routers = {id(part) for router in routers if router is not None for part in router.modules()}
        names = {}
        for path, module in model.named_modules():
            if (
                type(module) is nn.Linear
                and module.weight.dtype == dtype
                and dtype.itemsize <= 4
                and owners[id(module.weight)] == 1
                and id(module) not in parts_of_routers
                and not _is_gate(path)
                and _is_smaller(module, form)
                and _is_only_called(model, path)
            ):
                name = experts.dense_names.get(f"{path}.weight")
                if name is not None and _is_on_disk(experts, name, module):
                    names[path] = name
        return cls(form, device_type, names)

    def settle(self, model: nn.Module) -> None:
        """Give the quantised layers of `model` that lie on the CPU one region of memory, in huge pages where there are
        such: a token reads all of it. They must have no numbers yet."""
        layers: list[Any] = [model.get_submodule(path) for path in self.names]
        rows: list[Any] = [block for layer in layers for block in layer.blocks]
        if rows and all(buffer.device.type == "cpu" for block in rows for buffer in block.buffers()):
            region = HostRegion(sum(align(buffer.nbytes) for block in rows for buffer in block.buffers())).tensor
            for block in rows:
                for name, buffer in block.named_buffers():
                    own, region = region[: buffer.nbytes], region[align(buffer.nbytes) :]
                    setattr(block, name, own.view(buffer.dtype).view(buffer.shape))

    def replace(self, model: nn.Module) -> None:
        """Put quantised layers, without numbers yet, in the place of the plain ones."""
        for path in self.names:
            parent, _, name = path.rpartition(".")
            linear: Any = model.get_submodule(path)
            setattr(model.get_submodule(parent), name, QuantisedLinear(linear, self.form, self.device_type))


def _is_gate(path: str) -> bool:
    """Whether the layer decides between experts, or whether one counts: a "gate_proj" is neither."""
    return any(re.fullmatch(r"(.*_)?(gate|router)", part) for part in path.split("."))


def _is_smaller(linear: nn.Linear, form: Format) -> bool:
    stored = form.stored(linear.out_features, linear.in_features, form.levels[0])
    return sum(field.nbytes for field in stored) < linear.weight.nbytes


def _is_on_disk(experts: ExpertMap, name: str, linear: nn.Linear) -> bool:
    """Whether the tensor is what the layer needs; transformers says what is wrong with any other."""
    info = experts.dense[name]
    dtype = TORCH_DTYPES.get(info.dtype)
    return dtype is not None and dtype.is_floating_point and info.shape == linear.weight.shape


def _is_only_called(model: nn.Module, path: str) -> bool:
    """Whether the code of the module that owns the layer reads nothing of its weight but the dtype."""
    owner, _, name = path.rpartition(".")
    while isinstance(model.get_submodule(owner), (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        owner, _, name = owner.rpartition(".")
    cls: Any = type(model.get_submodule(owner))
    code = class_code(cls)
    return code is not None and not re.search(rf"\.{re.escape(name)}(\[[^]]*\])*\.weight\b(?!\.dtype\b)", code)
