"""What plans use most is measured, what does not fit is estimated, and both end in time on a machine of any speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from slow_clock import SlowClock

from offload.costs.machine import ProductCurve
from offload.device.base import CpuDevice
from offload.machine.budget import Budget
from offload.machine.compute import DENSE_FORMATS, DENSE_SHAPE, DENSE_TOKENS, EXPERTS, FORMATS
from offload.machine.products import Product, Times, curves, measure_products

BITS = {"bf16": 16, "fp32": 32, "int8": 8, "nf4": 4, "int4": 4, "int2": 2, "int3": 3}
BYTES_PER_S, FLOPS = 1e10, 6e10


def truth(weights: int, format: str, tokens: int) -> float:
    """Memory for few tokens and arithmetic for many, on a machine of slowness 1, with AVX2 alone."""
    return 30e-6 + max(weights * BITS[format] / 8 / BYTES_PER_S, 2 * weights * tokens / FLOPS)


def product(clock: SlowClock, slowness: float, format: str, weights: int, tokens: Sequence[int]) -> Product:
    def call(count: int) -> None:
        clock.take(slowness * truth(weights, format, count))

    return Product(format, (weights, 1), weights * BITS[format] // 8, 1, tokens, call, CpuDevice())


def a_machine(clock: SlowClock, slowness: float) -> list[Times]:
    usual, *others = sorted(EXPERTS.items(), key=lambda item: -len(item[1]))
    shapes = [(3 * shape[0] * shape[1], tokens) for shape, tokens in (usual, *others)]
    first = [Times(product(clock, slowness, name, shapes[0][0], shapes[0][1])) for name in FORMATS]
    dense = DENSE_SHAPE[0] * DENSE_SHAPE[1]
    second = [Times(product(clock, slowness, name, dense, DENSE_TOKENS)) for name in DENSE_FORMATS]
    rest = [Times(product(clock, slowness, name, *shape)) for name in FORMATS for shape in shapes[1:]]
    return [*first, *second, *rest]


def worst(found: Sequence[ProductCurve], slowness: float, tokens: int) -> float:
    """By which factor the worst of the curves is off."""
    ratios = [curve.seconds(tokens) / slowness / truth(curve.shape[0], curve.format, tokens) for curve in found]
    return max(max(ratios), 1 / min(ratios))


@pytest.mark.parametrize("slowness", [0.1, 1.0, 10.0, 30.0])
def test_it_ends_in_time_and_knows_every_product(slowness: float) -> None:
    clock = SlowClock()
    times = a_machine(clock, slowness)
    measure_products(times, Budget(15.0, clock))
    assert clock.now_s < 16.0
    found = curves(times)
    assert {(curve.format, curve.shape) for curve in found} == {(e.product.format, e.product.shape) for e in times}
    assert worst(found, slowness, 1) < 1.1
    for tokens in (8, 32, 128):
        assert worst([curve for curve in found if curve.seconds.at[-1] >= tokens], slowness, tokens) < 2.0
    assert any(curve.extrapolated for curve in found) == (slowness > 1)


def test_one_token_comes_first_then_the_most_that_fit_then_what_is_between() -> None:
    clock = SlowClock()
    asked = list[tuple[str, int]]()

    def recorded(format: str) -> Times:
        timed = product(clock, 1.0, format, 2**20, (1, 8, 32, 128))

        def call(tokens: int) -> None:
            asked.append((format, tokens))
            timed.call(tokens)

        return Times(replace(timed, call=call))

    times = [recorded("bf16"), recorded("nf4")]
    measure_products(times, Budget(15.0, clock))
    assert list(dict.fromkeys(asked)) == [(name, n) for n in (1, 128, 32, 8) for name in ("bf16", "nf4")]


def known(clock: SlowClock, format: str, weights: int, seconds: dict[int, float]) -> Times:
    return Times(product(clock, 1.0, format, weights, (1, 8, 32, 128)), seconds)


def test_estimates() -> None:
    clock = SlowClock()
    usual = known(clock, "bf16", 2**20, {1: 1.0, 8: 2.0, 32: 6.0, 128: 20.0})
    large = known(clock, "bf16", 2**22, {1: 4.0, 8: 9.0})  # as the usual one does
    other = known(clock, "nf4", 2**20, {1: 0.5, 8: 2.6})  # linear from its last two: 0.3 a token
    scant = known(clock, "int8", 2**20, {1: 0.8})  # as the best known format of the same arithmetic
    never = known(clock, "fp32", 2**20, {})
    alone = known(clock, "int2", 2**10, {1: 0.1})  # nothing is about as large
    found = {
        (curve.format, curve.weight_bytes): curve for curve in curves([usual, large, other, scant, never, alone], 2)
    }
    assert {name for name, _ in found} == {"bf16", "nf4", "int8"}
    assert found["bf16", 2**21].extrapolated == ()
    assert found["bf16", 2**23].extrapolated == (32, 128)
    assert found["bf16", 2**23].seconds(128) == pytest.approx(90.0)
    assert found["nf4", 2**19].seconds(128) == pytest.approx(2.6 + 120 * 0.3)
    assert found["int8", 2**20].seconds.at == (1, 8, 32, 128)
    assert found["int8", 2**20].seconds(8) == pytest.approx(2.9)


def test_a_product_of_one_count_needs_no_other() -> None:
    clock = SlowClock()
    times = [Times(product(clock, 1.0, "bf16", 2**20, (1,)))]
    measure_products(times, Budget(5.0, clock))
    (curve,) = curves(times)
    assert curve.seconds.at == (1,)
