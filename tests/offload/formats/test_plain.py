"""Our products with plain and 8-bit matrices: as exact as float32 sums are, and each row's bits its own."""

from __future__ import annotations

import pytest
import torch

from offload.formats.cpu import columns, native
from offload.formats.cpu import threads as own_threads
from offload.formats.cpu.plain import is_faster, products, serves

MATRICES = [torch.bfloat16, torch.float16, torch.int8]
INPUTS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Dtypes of x and y, and by how much of itself y may change when it is rounded."""
_SUMS = 2e-7  # of the sum without signs: what rounding on the way to it may be


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.int8:
        return torch.randint(-127, 128, shape, generator=generator, dtype=dtype)
    return torch.randn(*shape, generator=generator).to(dtype)


def scales_of(matrix: torch.Tensor) -> torch.Tensor | None:
    return random(len(matrix), dtype=torch.bfloat16, seed=7) / 100 if matrix.dtype is torch.int8 else None


def multiplied(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    scales = scales_of(matrix)
    return products(x, [matrix], None if scales is None else [scales])


def both_ways(x: torch.Tensor, matrix: torch.Tensor) -> list[torch.Tensor]:
    """The product with the matrix as it lies, and with its transpose, where that is served."""
    found = [multiplied(x, matrix)]
    if columns.serves(matrix.dtype, len(matrix)):
        found.append(columns.products(x, [matrix.t().contiguous()]))
    return found


def meant(x: torch.Tensor, matrix: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    """The product in float64."""
    exact = x.double() @ matrix.double().t()
    return exact if scales is None else exact * scales.double()


def distance(y: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor) -> float:
    """From float64's product, relative to its norm."""
    exact = meant(x, matrix)
    return ((y.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("m", [1, 2, 3, 6, 11])
@pytest.mark.parametrize(("n", "k"), [(40, 32), (33, 96), (1, 64), (70, 1120), (64, 2048), (192, 96)])
@pytest.mark.parametrize("dtype", INPUTS, ids=str)
@pytest.mark.parametrize("kind", MATRICES, ids=str)
def test_a_product_is_float64s_but_for_rounding(
    kernel_level: int, kind: torch.dtype, dtype: torch.dtype, n: int, k: int, m: int
) -> None:
    x, matrix = random(m, k, dtype=dtype, seed=1), random(n, k, dtype=kind)
    exact, unsigned = (meant(a, w, scales_of(matrix)) for a, w in ((x, matrix), (x.abs(), matrix.double().abs())))
    for y in both_ways(x, matrix):
        assert (y.dtype, y.shape) == (dtype, (m, n))
        assert ((y.double() - exact).abs() <= INPUTS[dtype] * exact.abs() + _SUMS * unsigned.abs() + 1e-7).all()


@pytest.mark.parametrize("kind", MATRICES, ids=str)
def test_a_row_has_the_bits_that_it_has_among_others(kernel_level: int, kind: torch.dtype) -> None:
    x, matrix = random(103, 1184, dtype=torch.bfloat16), random(64, 1184, dtype=kind)
    alone = [torch.cat(rows) for rows in zip(*(both_ways(row, matrix) for row in x.split(1)), strict=True)]
    for m in (2, 3, 4, 5, 6, 7, 13, 47, 48, 49, 103):
        for y, expected in zip(both_ways(x[:m], matrix), alone, strict=True):
            assert torch.equal(y, expected[:m])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shared", [True, False])
def test_a_batch_gives_the_bits_of_each_by_itself_on_any_number_of_threads(
    kernel_level: int, shared: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 7
    matrices = [random(128, 128, dtype=torch.bfloat16, seed=i) for i in range(count)]
    x = random(1 if shared else count, 128, dtype=torch.bfloat16, seed=9)
    rows = x.expand(count, 128).split(1)
    for multiply in (products, columns.products):
        each = torch.cat([multiply(row, [matrix]) for row, matrix in zip(rows, matrices, strict=True)])
        monkeypatch.setattr(own_threads, "count", lambda: threads)
        for _ in range(50):
            assert torch.equal(multiply(x, matrices), each)


def test_long_prompts_are_taken_in_parts(kernel_level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, matrix = random(50, 128, dtype=torch.float16), random(64, 128, dtype=torch.float16)
    whole = both_ways(x, matrix)
    monkeypatch.setattr("offload.formats.cpu.jobs.ROOM", 7 * 144 + 5)
    assert all(map(torch.equal, both_ways(x, matrix), whole))
    assert [y.shape for y in both_ways(x[:0], matrix)] == 2 * [(0, 64)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_no_number_stays_none_and_what_is_too_large_is_infinite(kernel_level: int, dtype: torch.dtype) -> None:
    matrix = torch.full((64, 64), torch.finfo(dtype).max, dtype=dtype)
    matrix[0] = 1
    x = torch.ones(3, 64, dtype=dtype)
    x[1, 5] = torch.nan
    x[2, 5] = torch.inf
    for y in both_ways(x, matrix):
        assert y[0].tolist() == [64.0] + 63 * [torch.inf]
        assert y[1].isnan().all()
        assert y[2].isposinf().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_torchs(kernel_level: int, dtype: torch.dtype) -> None:
    """Halfway cases among them: every sum is 1 and some 2**-13s, which float32 holds."""
    matrix = torch.zeros(2048, 32, dtype=dtype)
    matrix[:, 0] = 1
    matrix[:, 1] = torch.arange(2048).remainder(256)
    matrix[:, 2] = torch.arange(2048).div(256, rounding_mode="floor")
    x = torch.zeros(1, 32, dtype=dtype)
    x[0, :3] = torch.tensor([1.0, 2**-13, 2**-5])
    exact = matrix.float() @ x[0].float()
    assert all(torch.equal(y[0], exact.to(dtype)) for y in both_ways(x, matrix))


def test_distances_from_float64_are_no_larger_than_torchs(
    kernel_level: int, capsys: pytest.CaptureFixture[str]
) -> None:
    x, matrix = random(64, 2048, dtype=torch.bfloat16, seed=3), random(768, 2048, dtype=torch.bfloat16, seed=4)
    ours, theirs = distance(products(x, [matrix]), x, matrix), distance(torch.mm(x, matrix.t()), x, matrix)
    with capsys.disabled():
        print(f"\nlevel {kernel_level}: distance of a bfloat16 product from float64: {ours:.3e}, torch's {theirs:.3e}")
    assert ours <= 1.01 * theirs


def test_it_serves_whole_vectors_and_where_bfloat16_is_slow(kernel_level: int) -> None:
    assert serves(torch.bfloat16, 96)
    assert not serves(torch.bfloat16, 80)
    assert not serves(torch.float32, 96)
    assert columns.serves(torch.float16, 128)
    assert not columns.serves(torch.float16, 96)
    assert not columns.serves(torch.int8, 128)
    assert is_faster() == (kernel_level < native.BF16)
