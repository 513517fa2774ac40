"""A loss that saves no time is given back: by whom, by which option, and when the time is exactly met."""

from __future__ import annotations

from math import inf

from offload.decide.fallbacks.base import SKIP
from offload.decide.schedulers.base import Costs, Load, give_back, make_scheduler, timed

COSTS = Costs(gpu_s=lambda n: 1.0, cpu_s=lambda n: 3.0, copy_s=4.0)
RESIDENTS = [Load(1, True)] * 5  # the accelerator computes them until 5
"""What a lossy expert's copy may hide behind."""


def lossy(loss: float, copy_s: float, host_s: float = inf) -> Load:
    """Copied in a second at a loss, or without one in `copy_s`; host memory has it at `host_s`."""
    whole = Load(1, False, copy_s=copy_s, host_s=host_s)
    return Load(1, False, copy_s=1.0, host_s=inf, precision=1, loss=loss, options=(whole,))


def test_what_makes_the_layer_no_longer_is_given_back() -> None:
    for copy_s, served in ((5.0, {5: 0}), (5.5, {})):  # landed at 5 it is computed until 6, as at a loss
        loads = [*RESIDENTS, lossy(0.5, copy_s)]
        result = give_back(loads, COSTS, timed(loads, COSTS, range(6), ()))
        assert result.served == served and result.gpu == tuple(range(6)) and result.makespan_s == 6.0


def test_the_cpu_takes_it_if_it_can() -> None:
    for host_s, cpu in ((3.0, (5,)), (3.5, ())):  # until 6, or longer
        loads = [*RESIDENTS, lossy(0.5, 5.0, host_s)]
        assert give_back(loads, COSTS, timed(loads, COSTS, range(6), ())).cpu == cpu


def test_who_loses_most_comes_first() -> None:
    loads = [*RESIDENTS, lossy(0.2, 4.0), lossy(0.3, 4.0)]  # both whole land at 8, one of them at 5
    assert give_back(loads, COSTS, timed(loads, COSTS, range(7), ())).served == {6: 0}


def test_an_option_that_loses_as_much_changes_nothing() -> None:
    """The CPU computes it without loss already, so it is not sent elsewhere for the same."""
    load = Load(1, False, precision=1, loss=0.5, host_loss=0.0, options=(Load(1, True),))
    found = timed([load], COSTS, (), (0,))
    assert give_back([load], COSTS, found) == found


def test_rules_that_only_assign_give_back_all_the_same() -> None:
    """What is copied whole in time, and what is left out though the CPU has time for it."""
    left_out = Load(1, True, host_s=inf, precision=SKIP, loss=0.9, left_out=True, options=(Load(1, True),))
    result = make_scheduler("gpu-only").serve([*RESIDENTS, lossy(0.5, 5.0), left_out], COSTS)
    assert result.served == {5: 0, 6: 0} and result.cpu == (6,) and result.makespan_s == 6.0
