"""How many threads compute on the CPU, and whose: torch's, or those of this project's own kernels."""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from contextlib import ExitStack
from functools import cache

import torch
from torch import nn

from cache.errors import DeviceError
from offload.formats import Format
from offload.formats.cpu.plain import most_rows, serves
from offload.formats.precision import form_of
from offload.layers.linear import QuantisedLinear
from offload.layers.products import takes_our_products
from offload.plan.prepare import Prepared
from offload.plan.work import SMALL_EXPERT_BYTES, computing_threads
from offload.store.record import RecordLayout
from offload.system.cores import at_most_cores

_FEW = 0.05
"""A share of the linear layers' weights that may be plain, as routers are, and the rest still counts as all."""


def set_threads(prepared: Prepared, threads: int | None, resources: ExitStack) -> int:
    """Let so many of torch's threads compute until `resources` close; gives how many do beside an accelerator.

    None: as many as are best; never more than cores. Raises DeviceError for less than one.
    """
    if threads is not None and threads < 1:
        raise DeviceError(f"--threads {threads}: at least one thread computes")
    threads = at_most_cores(threads)
    plan = prepared.plan
    _mind_forks()
    if _Fork.is_here:
        if threads is not None and threads > 1:
            warnings.warn(
                f"--threads {threads}: one computes, since this process is a fork of one in which a model was loaded, "
                "and torch's threads are not in it",
                stacklevel=5,
            )
        threads = 1
    computing = threads or computing_threads(plan.device, plan.slot_bytes)
    if computing is not None:
        resources.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(computing)
    return threads or (1 if plan.slot_bytes < SMALL_EXPERT_BYTES else prepared.device.threads_beside)


class _Fork:
    is_here = False
    """Whether this process is a fork of one that had loaded a model."""


@cache
def _mind_forks() -> None:
    """From now on, let torch compute on one thread in every fork: it would wait for OpenMP's others, which are not
    there, for ever."""

    def one_thread() -> None:
        _Fork.is_here = True
        torch.set_num_threads(1)

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=one_thread)


def own_rows(prepared: Prepared) -> int:
    """Of up to how many tokens the products with experts and with linear layers, but for a few, run on threads of our
    own."""
    if prepared.device.is_accelerator:
        return 0
    experts = min(_own_rows_of_experts(prepared, precision) for precision in prepared.precisions)
    return min(experts, _own_rows_of_linears(prepared.checkpoint.skeleton, exact=prepared.products.exact))


def _own_rows_of_experts(prepared: Prepared, precision: str) -> int:
    layers = prepared.experts.layers
    form = None if precision == "auto" else form_of(precision)
    if isinstance(form, Format):
        return min(
            form.own_rows(shape.n, shape.k, precision, "cpu")
            for layer in layers
            for _, shape in RecordLayout.of(layer, form).matrices
        )
    if prepared.products.exact or not all(takes_our_products(layer, form) for layer in layers):
        return 0
    return most_rows()


def _own_rows_of_linears(skeleton: nn.Module, *, exact: bool) -> int:
    weights: Counter[int] = Counter()  # by own rows
    for module in skeleton.modules():
        if isinstance(module, QuantisedLinear):
            weights[module.own_rows] += module.weight.numel()
        elif isinstance(module, nn.Linear):
            is_ours = not exact and serves(module.weight.dtype, module.in_features)
            weights[most_rows() if is_ours else 0] += module.weight.numel()
    few = _FEW * weights.total()
    for rows in sorted(weights):
        few -= weights[rows]
        if few < 0:
            return rows
    return sys.maxsize
