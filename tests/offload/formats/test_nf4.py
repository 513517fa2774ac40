"""NF4 is bitsandbytes' own, bit for bit."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kernel_levels import kernels_of
from packed_nf4 import codes, meaning, packed, scales

from offload.formats import FORMATS, Fields
from offload.formats.cpu import native
from offload.formats.cpu.nf4 import pack_codes, products, unpack_codes
from offload.formats.nf4 import bitsandbytes, code, code_int8, code_int16, has_packed_kernel

ROOT = Path(__file__).resolve().parents[3]
NF4 = FORMATS["nf4"]
SHAPES = [(96, 192), (64, 64), (32, 128), (70, 33), (5, 7)]


def weight(n: int, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_stored_form_and_its_meaning_are_bitsandbytes_own(n: int, k: int, dtype: torch.dtype) -> None:
    w = weight(n, k, dtype)
    fields = NF4.encode(w)
    codes, state = bitsandbytes().quantize_4bit(w, blocksize=64, quant_type="nf4")
    assert torch.equal(fields["codes"], codes.view(-1))
    assert torch.equal(fields["absmax"], state.absmax)
    decoded = NF4.decode(fields, n, k, "nf4", dtype)
    assert torch.equal(decoded, bitsandbytes().dequantize_4bit(codes, state))


@pytest.mark.parametrize("k", [16, 32, 33, 48, 64, 96, 100, 160, 208])
def test_blocks_go_on_from_row_to_row(k: int) -> None:
    """Also where a row is no whole number of blocks."""
    fields = NF4.encode(weight(5, k))
    bytes_ = fields["codes"].int()
    codes = torch.stack([bytes_ >> 4, bytes_ & 15], dim=1).view(-1)[: 5 * k]
    meant = code()[codes] * fields["absmax"].repeat_interleave(64)[: 5 * k]
    assert torch.equal(NF4.decode(fields, 5, k, "nf4", torch.float32), meant.view(5, k))


@pytest.mark.parametrize("compiled", [True, False], ids=["native", "plain"])
@pytest.mark.parametrize(("n", "k"), [(32, 64), (64, 64), (96, 192), (160, 128), (288, 64)])
def test_packing_is_bitsandbytes_own_and_can_be_undone(
    n: int, k: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled and native.library() is None:
        pytest.skip("the kernels in C are not built")
    if not compiled:
        monkeypatch.setattr("offload.formats.cpu.nf4.library", lambda: None)
    fields = NF4.encode(weight(n, k))
    codes, state = bitsandbytes().quantize_4bit(weight(n, k), blocksize=64, quant_type="nf4")
    theirs, packed_state = bitsandbytes()._convert_weight_packed_for_cpu(codes, state)
    scales = packed_state.absmax
    out = {"codes": torch.empty(n, k // 2, dtype=torch.uint8), "absmax": torch.empty_like(scales)}
    NF4.pack(fields, n, k, "nf4", out)
    assert torch.equal(out["codes"], theirs)
    assert torch.equal(out["absmax"], scales)
    ours = torch.empty(n // 32, k // 64, 32, dtype=torch.bfloat16)
    NF4.pack(fields, n, k, "nf4", {**out, "absmax": ours})
    assert all(torch.equal(tile, scales[:, at : at + 32]) for tile, at in zip(ours, range(0, n, 32), strict=True))
    assert torch.equal(unpack_codes(out["codes"]), fields["codes"])
    again = torch.empty_like(theirs)
    pack_codes(fields["codes"], again)
    assert torch.equal(again, theirs)


def some(n: int, k: int, seed: int = 0) -> Fields:
    """A packed matrix [n, k]."""
    return packed(torch.randn(n, k, generator=torch.Generator().manual_seed(n * k + seed)))


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize(("n", "k"), [(32, 64), (96, 192), (64, 1024)])
def test_a_product_is_what_the_packed_matrix_means(kernel_level: int, n: int, k: int, m: int) -> None:
    fields = some(n, k)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).bfloat16()
    y = products(x, [fields], n, code_int16())
    exact = x.double() @ meaning(fields).t()
    assert (y.double() - exact).abs().max() <= exact.abs().max() * 2**-8


def test_inputs_lose_nothing_down_to_a_32nd_of_the_largest(kernel_level: int) -> None:
    n, k = 96, 1024
    fields = some(n, k)
    signs = torch.randint(0, 2, (5, k), generator=torch.Generator().manual_seed(0)) * 2 - 1
    exponents = torch.randint(0, 5, (5, k), generator=torch.Generator().manual_seed(1))
    x = (signs * (1 + torch.rand(5, k, generator=torch.Generator().manual_seed(2))) * 2.0**-exponents).bfloat16()
    y = products(x, [fields], n, code_int16())
    exact = x.double() @ meaning(fields).t()
    float32_sums = (x.double().abs() @ meaning(fields).abs().t()) * 2**-22
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001 + float32_sums).all()


def test_they_are_closer_to_float64_than_products_in_bfloat16(kernel_level: int) -> None:
    n, k = 256, 2048
    fields = some(n, k)
    weight = code().double()[codes(fields)] * scales(fields)
    x = torch.randn(8, k, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() @ weight.t()
    ours = products(x, [fields], n, code_int16())
    plain = torch.mm(x, weight.bfloat16().t())
    rounded = exact.bfloat16()

    def distance(y: torch.Tensor) -> float:
        return float((y.double() - exact).norm() / exact.norm())

    print(f"distance from float64: ours {distance(ours):.2e}, bfloat16 {distance(plain):.2e}")
    print(f"and of float64 in bfloat16 {distance(rounded):.2e}")
    assert distance(ours) <= 1.02 * distance(rounded) < distance(plain)


def test_long_prompts_are_taken_in_parts(kernel_level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    n, k = 64, 128
    fields = some(n, k)
    x = torch.randn(50, k, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = products(x, [fields], n, code_int16())
    monkeypatch.setattr("offload.formats.cpu.jobs.ROOM", 7 * k + 5)
    assert torch.equal(products(x, [fields], n, code_int16()), whole)


@pytest.mark.skipif(not native.level(), reason="our kernels do not run here")
@pytest.mark.parametrize("levels", [code_int16, code_int8])
def test_bits_are_the_same_at_every_level_and_beside_any_rows(levels: Callable[[], torch.Tensor]) -> None:
    """Sums of integers are exact, with VNNI or without."""
    n, k, found = 96, 320, []
    fields = some(n, k)
    x = torch.randn(103, k, generator=torch.Generator().manual_seed(0)).bfloat16()
    for level in range(native.AVX2, native.level() + 1):
        with kernels_of(level):
            alone = torch.cat([products(row, [fields], n, levels()) for row in x.split(1)])
            for m in (2, 3, 4, 5, 6, 7, 13, 47, 48, 49, 103):
                assert torch.equal(products(x[:m], [fields], n, levels()), alone[:m])
            found.append(alone)
    assert all(torch.equal(other, found[0]) for other in found)
    exact = x.double() @ meaning(fields).t()
    assert (found[0].double() - exact).norm() / exact.norm() < 0.012


def test_rounded_inputs_are_those_of_a_block_and_its_largest(kernel_level: int) -> None:
    n, k = 32, 128
    fields = some(n, k)
    weights = code_int8().double()[codes(fields)] / 127 * scales(fields)
    x = torch.randn(5, k, generator=torch.Generator().manual_seed(0)).bfloat16()
    blocks = x.double().view(5, 2, 64)
    largest = blocks.abs().amax(2, keepdim=True) / 127
    rounded = ((blocks / largest).round() * largest).view(5, k)
    y = products(x, [fields], n, code_int8())
    exact = rounded @ weights.t()
    assert (y.double() - exact).abs().max() <= exact.abs().max() * 2**-8


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 0.0, 1e-38])
@pytest.mark.parametrize("levels", [code_int16, code_int8])
def test_inputs_may_be_anything(kernel_level: int, levels: Callable[[], torch.Tensor], odd: float) -> None:
    fields = some(32, 128)
    x = torch.zeros(2, 128, dtype=torch.bfloat16)
    x[0, 3] = odd
    x[1] = 1
    y = products(x, [fields], 32, levels())
    assert y[0].isnan().all() if abs(odd) > 1 or odd != odd else (y[0] == 0).all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shared", [True, False])
def test_a_batch_gives_the_bits_of_each_by_itself_on_any_number_of_threads(
    kernel_level: int, shared: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, k, count = 160, 128, 7
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    matrices = [some(n, k, seed) for seed in range(count)]
    x = torch.randn(1 if shared else count, k, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = list(x.expand(count, k).split(1))
    each = torch.cat([products(row, [fields], n, code_int16()) for row, fields in zip(rows, matrices, strict=True)])
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for _ in range(50):
        assert torch.equal(NF4.linear_each(x, matrices, n, k, "nf4"), each)


def test_products_on_several_calling_threads_do_not_disturb_each_other(kernel_level: int) -> None:
    n, k = 320, 256
    matrices = [some(n, k, seed) for seed in range(4)]
    inputs = [torch.randn(1, k, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(4)]
    wanted = [products(x, matrices, n, code_int16()) for x in inputs]

    def repeat(i: int) -> bool:
        return all(torch.equal(products(inputs[i], matrices, n, code_int16()), wanted[i]) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, range(4)))


@pytest.mark.skipif(not has_packed_kernel(), reason="this CPU has no kernel for packed matrices")
def test_only_shapes_that_the_kernel_takes_are_packed() -> None:
    assert NF4.packed(96, 192, "nf4", "cpu") is not None
    assert NF4.packed(96, 192, "nf4", "cuda") is None
    assert NF4.packed(90, 192, "nf4", "cpu") is None
    assert NF4.packed(96, 200, "nf4", "cpu") is None


def test_without_our_kernels_scales_lie_as_bitsandbytes_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.formats.nf4.has_packed_kernel", lambda: True)
    monkeypatch.setattr("offload.formats.cpu.native.level", lambda: native.NONE)
    fields = NF4.packed(96, 192, "nf4", "cpu")
    assert fields is not None
    assert {field.name: field.shape for field in fields} == {"codes": (96, 96), "absmax": (3, 96)}
    out = {field.name: torch.empty(field.shape, dtype=field.dtype) for field in fields}
    plain = NF4.encode(weight(96, 192))
    NF4.pack(plain, 96, 192, "nf4", out)
    x = weight(70, 192, torch.bfloat16)
    rounded = {**plain, "absmax": plain["absmax"].bfloat16().float()}
    exact = x.double() @ NF4.decode(rounded, 96, 192, "nf4", torch.float32).double().t()
    for m in (1, 70) if bitsandbytes().has_avx512bf16() else (70,):
        y = NF4.linear(x[:m], out, 96, 192, "nf4").double()
        assert (y - exact[:m]).norm() <= 0.01 * exact[:m].norm()


def test_without_the_fast_kernel_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.formats.nf4.has_packed_kernel", lambda: False)
    assert NF4.packed(96, 192, "nf4", "cpu") is None
    w, x = weight(96, 192), weight(3, 192)
    fields = NF4.encode(w)
    assert torch.equal(NF4.linear(x, fields, 96, 192, "nf4"), x @ NF4.decode(fields, 96, 192, "nf4", x.dtype).T)


def test_threads_that_import_bitsandbytes_together_leave_its_logger_as_it_was() -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before = logger.level
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: bitsandbytes.__wrapped__(), range(400)))
    assert logger.level == before


def test_importing_bitsandbytes_says_nothing() -> None:
    code = "from offload.formats.nf4 import bitsandbytes; bitsandbytes()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout + run.stderr == ""
    assert logging.getLogger("bitsandbytes.backends.cpu.ops").level == logging.NOTSET


@pytest.mark.parametrize("m", [1, 3, 60])
def test_products_may_be_written_between_others(kernel_level: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    n, k = 96, 128
    fields = some(n, k)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).bfloat16()
    monkeypatch.setattr("offload.formats.cpu.jobs.ROOM", 7 * k)
    whole = torch.full((m, 3 * n), 7, dtype=torch.bfloat16)
    NF4.linear_into(x, fields, n, k, "nf4", whole[:, n : 2 * n])
    assert torch.equal(whole[:, n : 2 * n], NF4.linear(x, fields, n, k, "nf4"))
    assert (whole[:, :n] == 7).all() and (whole[:, 2 * n :] == 7).all()
