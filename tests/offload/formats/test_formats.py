"""What every format promises: stable bits, fields as declared, products close to those with the decoded weights."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from cache.errors import FormatError
from offload.formats import FORMATS, Fields, Format, find_format

LEVELS = [(form, level) for form in FORMATS.values() for level in form.levels]
LEVEL_IDS = [level for _, level in LEVELS]
SHAPES = [(128, 128), (192, 64), (64, 40), (96, 192), (70, 33), (5, 7), (1, 1)]
ROWS = (1, 2, 7, 8, 31, 64, 65, 128)
# Relative to the exact product with the decoded weights. Kernels round the weights, or parts of the sum, to the dtype
# they compute in: x's own; float32 for float16; bfloat16 for NF4's packed kernel, which rounds absmax too.
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}


def weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02


def aligned(tensor: torch.Tensor, shift: int = 0) -> torch.Tensor:
    """A copy at another address, a multiple of 64."""
    buffer = torch.empty(tensor.nbytes + 64 * (2 + shift), dtype=torch.uint8)
    start = -buffer.data_ptr() % 64 + 64 * shift
    view = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    assert view.data_ptr() % 64 == 0
    return view.copy_(tensor)


def resident(form: Format, stored: Fields, n: int, k: int, level: str, shift: int = 0) -> dict[str, torch.Tensor]:
    """The fields as they lie in memory on the CPU."""
    packed = form.packed(n, k, level, "cpu")
    mine = {field.name: aligned(stored[field.name], shift) for field in form.stored(n, k, level)}
    if packed is None:
        return mine
    out = {field.name: aligned(torch.empty(field.shape, dtype=field.dtype), shift) for field in packed}
    form.pack(mine, n, k, level, out)
    return out


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fields_are_as_declared_and_the_same_every_time(form: Format, dtype: torch.dtype) -> None:
    for n, k in SHAPES:
        w = weight(n, k).to(dtype)
        once, again = form.encode(w), form.encode(aligned(w, 1))
        declared = [field for part in form.fields(n, k) for field in part]
        assert once.keys() == {field.name for field in declared}
        for field in declared:
            tensor = once[field.name]
            assert (tensor.dtype, tensor.shape, tensor.nbytes) == (field.dtype, field.shape, field.nbytes)
            assert tensor.is_contiguous()
            assert torch.equal(tensor, again[field.name])


@pytest.mark.parametrize(("form", "level"), LEVELS, ids=LEVEL_IDS)
def test_stored_bytes_decode_to_the_same_bits(form: Format, level: str) -> None:
    for n, k in SHAPES:
        stored = form.encode(weight(n, k))
        from_bytes = {
            field.name: torch.frombuffer(
                bytearray(stored[field.name].view(torch.uint8).numpy().tobytes()), dtype=field.dtype
            ).view(field.shape)
            for field in form.stored(n, k, level)
        }
        for dtype in (torch.float32, torch.bfloat16):
            decoded = form.decode(from_bytes, n, k, level, dtype)
            assert decoded.shape == (n, k)
            assert decoded.dtype == dtype
            assert torch.equal(decoded, form.decode(stored, n, k, level, dtype))


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_special_matrices(form: Format) -> None:
    """Zeros stay zeros, one value alone stays that value, large and tiny weights keep their precision."""
    for level in form.levels:
        zeros = form.decode(form.encode(torch.zeros(64, 128)), 64, 128, level, torch.float32)
        assert torch.equal(zeros, torch.zeros(64, 128))
        for scale in (1e-6, 1.0, 1e4):
            w = weight(64, 128) * scale
            decoded = form.decode(form.encode(w), 64, 128, level, torch.float32)
            assert error(decoded, w) < 0.4
            constant = form.decode(form.encode(torch.full((64, 128), scale)), 64, 128, level, torch.float32)
            torch.testing.assert_close(constant, torch.full((64, 128), scale), rtol=5e-3, atol=0)


@pytest.mark.parametrize(("form", "level"), LEVELS, ids=LEVEL_IDS)
def test_packed_is_never_larger_than_stored(form: Format, level: str) -> None:
    for (n, k), device in itertools.product(SHAPES, ("cpu", "cuda")):
        packed = form.packed(n, k, level, device)
        if packed is not None:
            assert sum(f.nbytes for f in packed) <= sum(f.nbytes for f in form.stored(n, k, level))
        else:
            with pytest.raises((ValueError, KeyError)):
                form.pack({}, n, k, level, {})


@pytest.mark.usefixtures("nested_kernels")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("form", "level"), LEVELS, ids=LEVEL_IDS)
def test_linear_is_close_to_the_product_with_decoded_weights(form: Format, level: str, dtype: torch.dtype) -> None:
    for n, k in SHAPES:
        stored = form.encode(weight(n, k))
        fields = resident(form, stored, n, k, level)
        exact = form.decode(stored, n, k, level, torch.float32).double()
        tolerance = TOLERANCE[torch.bfloat16 if fields.get("absmax", exact).dtype == torch.bfloat16 else dtype]
        for m in ROWS:
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
            y = form.linear(x, fields, n, k, level)
            assert y.shape == (m, n)
            assert y.dtype == dtype
            # What a sum loses depends on its terms, not on what is left of them.
            scale = (x.double().abs() @ exact.abs().T).norm() / k**0.5
            assert (y.double() - x.double() @ exact.T).norm() <= tolerance * scale, (n, k, m)


@pytest.mark.usefixtures("nested_kernels")
@pytest.mark.parametrize(("form", "level"), LEVELS, ids=LEVEL_IDS)
def test_addresses_do_not_change_a_bit(form: Format, level: str) -> None:
    for (n, k), dtype in itertools.product([(192, 128), (70, 33)], TOLERANCE):
        stored = form.encode(weight(n, k))
        sets = [resident(form, stored, n, k, level, shift) for shift in (0, 1, 3)]
        for m in ROWS:
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
            first, *others = [form.linear(aligned(x, i), fields, n, k, level) for i, fields in enumerate(sets)]
            assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("name", "most"),
    [("int8", 1.5e-2), ("nf4", 0.165), ("nested8", 1.0e-2), ("nested4", 0.16), ("nested3", 0.3), ("nested2", 0.6)],
)
def test_an_expert_with_gaussian_weights_is_as_close_as_expected(name: str, most: float) -> None:
    form, level = find_format(name)
    gate, up, down = weight(256, 512), weight(256, 512, 1), weight(512, 256, 2)
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(3))

    def expert(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.silu(x @ gate.T * 2) * (x @ up.T)) @ down.T

    decoded = [form.decode(form.encode(w), *w.shape, level, torch.float32) for w in (gate, up, down)]
    assert 0.8 * most < error(expert(*decoded), expert(gate, up, down)) < most


def test_names() -> None:
    assert find_format("int8") == (FORMATS["int8"], "int8")
    assert find_format("nf4") == (FORMATS["nf4"], "nf4")
    assert find_format("nested") == find_format("int8>int4>int3>int2") == (FORMATS["nested"], "nested8")
    assert find_format("nested2") == (FORMATS["nested"], "nested2")
    with pytest.raises(FormatError, match='no format is called "int5": choose one of int8, nf4, int8>int4>int3>int2, '):
        find_format("int5")


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.float() - exact).norm() / exact.norm())


def test_a_level_is_a_prefix_of_the_next() -> None:
    form: Any = FORMATS["nested"]
    two, four, eight = (form.stored(128, 256, level) for level in ("nested2", "nested4", "nested8"))
    assert four[: len(two)] == two
    assert eight[: len(four)] == four
    bits = [sum(field.nbytes for field in fields) * 8 / (128 * 256) for fields in (two, four, eight)]
    assert bits == [2.5, 4.5, 8.5]
