"""The kernel of one token's attention: close to float64, the same bits on any number of threads."""

from __future__ import annotations

import pytest
import torch

from offload.formats.cpu import native
from offload.formats.cpu.attention import one_token, serves

pytestmark = pytest.mark.skipif(not native.level(), reason="our kernels do not run here")


def tensors(rows: int, heads: int, shared: int, length: int, width: int) -> list[torch.Tensor]:
    torch.manual_seed(rows + heads + length + width)
    shapes = (heads, 1), (shared, length), (shared, length)
    return [torch.randn(rows, h, n, width).bfloat16() for h, n in shapes]


def exact(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = (each.double().repeat_interleave(group, dim=1) for each in (key, value))
    scores = query.double() @ key.transpose(2, 3) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2), (6, 2), (8, 2), (6, 1), (8, 1), (12, 1), (32, 2)])
@pytest.mark.parametrize(
    ("rows", "length", "width"), [(1, 1, 32), (2, 33, 64), (1, 256, 128), (3, 257, 96), (1, 900, 256)]
)
def test_it_is_attention(
    kernel_level: int, rows: int, heads: int, shared: int, length: int, width: int, masked: bool
) -> None:
    query, key, value = tensors(rows, heads, shared, length, width)
    mask = torch.rand(rows, 1, 1, length) < 0.6 if masked else None
    if mask is not None:
        mask[..., length // 2] = True
    assert serves(query, key, value, mask)
    expected = exact(query, key, value, mask, 0.2)
    y = one_token(query, key, value, mask, 0.2)
    assert y.shape == query.shape and y.dtype == torch.bfloat16
    assert ((y.double() - expected).abs() <= expected.abs() * 2**-8 * 1.01 + 1e-4).all()


def test_a_cache_with_room_and_one_mask_for_all_rows(kernel_level: int) -> None:
    query, key, value = tensors(2, 8, 2, 400, 64)
    mask = torch.rand(1, 1, 1, 400) < 0.5
    part = [each[:, :, 30:350] for each in (key, value)]
    y = one_token(query, *part, mask[..., 30:350], 0.125)
    expected = exact(query, *part, mask[..., 30:350], 0.125)
    assert ((y.double() - expected).abs() <= expected.abs() * 2**-8 * 1.01 + 1e-4).all()


def test_scores_far_apart(kernel_level: int) -> None:
    query, key, value = tensors(1, 8, 2, 700, 64)
    y = one_token(query * 30, key, value, None, 1.0)
    expected = exact(query * 30, key, value, None, 1.0)
    assert ((y.double() - expected).abs() <= expected.abs() * 2**-8 * 1.01 + 1e-3).all()


def test_bits_do_not_hang_on_threads(kernel_level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = tensors(2, 16, 4, 1500, 128)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr("offload.formats.cpu.threads.count", lambda threads=threads: threads)
        found += [one_token(query, key, value, None, 0.1) for _ in range(10)]
    assert all(torch.equal(other, found[0]) for other in found)


@pytest.mark.parametrize("length", [40, 600])
def test_sinks_and_masks_that_are_added(kernel_level: int, length: int) -> None:
    query, key, value = tensors(1, 12, 2, length, 64)
    mask, sinks = torch.randn(1, 1, 1, length).bfloat16(), 3 * torch.randn(12).bfloat16()
    mask[..., ::3] = torch.finfo(torch.bfloat16).min
    keys, values = (each.double().repeat_interleave(6, dim=1) for each in (key, value))
    scores = query.double() @ keys.transpose(2, 3) * 0.125 + mask.double()
    weights = torch.cat([scores, sinks.double().view(1, 12, 1, 1)], dim=-1).softmax(-1)[..., :-1]
    expected = weights @ values
    y = one_token(query, key, value, mask, 0.125, sinks)
    assert ((y.double() - expected).abs() <= expected.abs() * 2**-8 * 1.01 + 1e-4).all()


def test_what_is_no_number_stays_none(kernel_level: int) -> None:
    query, key, value = tensors(1, 4, 2, 300, 64)
    none = float("nan")
    sinks = torch.tensor([0, none, 0, 0]).bfloat16()
    assert one_token(query, key, value, None, 1.0, sinks).isnan().all(-1).flatten().tolist() == [
        False,
        True,
        False,
        False,
    ]
    key[:, 1, 7, 3] = none
    assert one_token(query, key, value, None, 1.0).isnan().all(-1).flatten().tolist() == [False, False, True, True]
    unseen = torch.ones(1, 1, 1, 300, dtype=torch.bool)
    unseen[..., 7] = False
    assert one_token(query, key, value, unseen, 1.0).isfinite().all()
    query[:, 0, 0, 0] = none
    assert one_token(query, key, value, unseen, 1.0)[:, 0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16])
def test_where_no_key_is_seen_nothing_comes_of_it(kernel_level: int, dtype: torch.dtype) -> None:
    query, key, value = tensors(1, 4, 2, 300, 64)
    mask = torch.zeros(1, 1, 1, 300, dtype=dtype)
    if dtype is torch.bfloat16:
        mask -= torch.inf
    assert (one_token(query, key, value, mask, 1.0) == 0).all()


def test_what_the_kernel_does_not_take() -> None:
    query, key, value = tensors(1, 8, 2, 20, 64)
    mask = torch.ones(1, 1, 1, 20, dtype=torch.bool)
    assert serves(query, key, value, mask)
    assert not serves(query.float(), key, value, None)
    assert not serves(query, key.half(), value, None)
    assert not serves(query, key, value, mask.float())
    assert not serves(query, key, value, mask.expand(1, 8, 1, 20))
    assert not serves(query, key, value, mask.expand(2, 1, 1, 20))
    assert not serves(query[..., :40], key[..., :40], value[..., :40], None)
    assert not serves(query, key.transpose(2, 3).contiguous().transpose(2, 3), value, None)
    assert not serves(query, key[:, :, :0], value[:, :, :0], None)
