"""The nested format: planes, levels, and the kernels that read them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.formats import FORMATS
from offload.formats.cpu.columns import FOUR_BITS, THREE_BITS
from offload.formats.cpu.features import has_int4_kernel
from offload.formats.cpu.nested import fill, join, weights
from offload.formats.nested import GROUP, decode_codes

NESTED = FORMATS["nested"]
shapes = st.tuples(st.integers(1, 200), st.integers(1, 200), st.integers(0, 1 << 30))


def weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def whole_codes(w: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """The 8-bit codes by their definition: w = zero + step / 16 * (q - 135.5)."""
    n, k = w.shape
    step, zero = groups.float().transpose(0, 1).repeat_interleave(GROUP, dim=1)[:n, :k].unbind(2)
    return ((w - zero) / (step / 16) + 135.5).nan_to_num(128).round().clamp(0, 255).to(torch.uint8)


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_planes_decode_to_the_shifted_codes(shape: tuple[int, int, int]) -> None:
    n, k, seed = shape
    w = weight(n, k, seed)
    fields = NESTED.encode(w)
    codes = whole_codes(w, fields["groups"])
    for level, shift in (("nested8", 0), ("nested4", 4), ("nested3", 5), ("nested2", 6)):
        of_level = {field.name: fields[field.name] for field in NESTED.stored(n, k, level)}
        assert torch.equal(decode_codes(of_level, n, k, level), codes >> shift)


@settings(max_examples=30, deadline=None)
@given(shapes)
def test_levels_mean_what_the_module_says(shape: tuple[int, int, int]) -> None:
    n, k, seed = shape
    fields = NESTED.encode(weight(n, k, seed))
    codes = decode_codes(fields, n, k, "nested8").float()
    step, zero = fields["groups"].float().transpose(0, 1).repeat_interleave(GROUP, dim=1)[:n, :k].unbind(2)
    high, low = codes // 16, codes % 16
    filled = high // 4 * 4 + torch.where(high < 8, 2, 1)
    third = high // 2 * 2 + 0.5
    means = {"nested8": high - 8 + (low - 7.5) / 16, "nested4": high - 8, "nested3": third - 8, "nested2": filled - 8}
    for level, meant in means.items():
        assert torch.equal(NESTED.decode(fields, n, k, level, torch.float32), zero + step * meant)


def test_every_level_is_as_close_as_stated() -> None:
    w = weight(256, 1024)
    fields = NESTED.encode(w)
    for level, most in (("nested8", 0.0055), ("nested4", 0.09), ("nested3", 0.18), ("nested2", 0.36)):
        error = (NESTED.decode(fields, 256, 1024, level, torch.float32) - w).norm() / w.norm()
        assert 0.9 * most < error < most


def test_a_group_far_from_zero_keeps_its_precision() -> None:
    w = 1 + weight(64, 128) * 1e-3
    decoded = NESTED.decode(NESTED.encode(w), 64, 128, "nested8", torch.float32)
    # The zero is a bfloat16 next to 1, so the range reaches up to 1/256 further than it need: 4 instead of 3 sigma.
    assert (decoded - w).abs().max() < 5e-3 / 128


@pytest.mark.usefixtures("nested_kernels")
@pytest.mark.parametrize(("n", "k"), [(64, 64), (320, 128), (70, 33), (5, 7), (130, 90)])
def test_unpacking_and_dequantising_on_the_cpu(n: int, k: int) -> None:
    fields = NESTED.encode(weight(n, k))
    upper, without = (torch.empty(fields["low"].shape, dtype=torch.uint8) for _ in range(2))
    join(fields["high"], fields["third"], fields["fourth"], upper)
    join(fields["high"], fields["third"], None, without)
    for level, above, below, middle in (
        ("nested8", upper, fields["low"], FOUR_BITS),
        ("nested4", upper, None, FOUR_BITS),
        ("nested3", without, None, THREE_BITS),
        ("nested2", fill(fields["high"]), None, FOUR_BITS),
    ):
        expected = NESTED.decode(fields, n, k, level, torch.float32).T
        float32 = weights(fields["groups"], above, below, torch.float32, middle)[:k, :n]
        torch.testing.assert_close(float32, expected, rtol=1e-5, atol=1e-6)
        bfloat16 = weights(fields["groups"], above, below, torch.bfloat16, middle)[:k, :n]
        torch.testing.assert_close(bfloat16.float(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("n", "k"), [(64, 64), (320, 128), (70, 33), (130, 90)])
def test_kernels_in_c_give_the_bits_of_torch(
    n: int, k: int, threads: int, nested_kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = NESTED.encode(weight(n, k) * 0.02)
    monkeypatch.setattr("offload.formats.cpu.threads.count", lambda: threads)

    def made() -> list[torch.Tensor]:
        upper, without = (torch.empty(fields["low"].shape, dtype=torch.uint8) for _ in range(2))
        join(fields["high"], fields["third"], fields["fourth"], upper)
        join(fields["high"], fields["third"], None, without)
        parts = [
            weights(fields["groups"], upper, low, dtype, middle)
            for low, middle in ((None, FOUR_BITS), (None, THREE_BITS), (fields["low"], FOUR_BITS))
            for dtype in (torch.bfloat16, torch.float32, torch.float64)
        ]
        return [upper, without, fill(fields["high"]), *parts]

    mine = made()
    monkeypatch.setattr("offload.formats.cpu.nested.vector_library", lambda: None)
    assert all(torch.equal(a, b) for a, b in zip(mine, made(), strict=True))


def test_without_torchs_kernel_the_product_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = NESTED.encode(weight(128, 192))
    x = weight(3, 192)
    with_kernel = NESTED.linear(x, fields, 128, 192, "nested2")
    monkeypatch.setattr("offload.formats.cpu.nested.has_int4_kernel", lambda: False)
    without = NESTED.linear(x, fields, 128, 192, "nested2")
    torch.testing.assert_close(with_kernel, without, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="torch's 4-bit kernel has this layout with AVX512 only"
)
def test_torchs_kernel_is_used_where_it_can_be() -> None:
    assert has_int4_kernel()
