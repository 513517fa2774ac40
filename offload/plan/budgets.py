"""Budgets -> how many bytes of what on which tier: the plan that `offload plan` prints and every load follows.

Arithmetic only. A plan is made before anything large is read, and a budget that cannot work is refused here, with the
numbers and the smallest that would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cache.errors import BudgetError, ContextError
from cache.types import Tier
from offload.decide.slices import divide
from offload.plan.needs import GROWTH_BYTES, Needs
from offload.plan.work import Work
from offload.system.sizes import format_bytes

MIB = 2**20
DEFAULT_CONTEXT = 4096
DEFAULT_SHARE = 0.9
"""Of the memory that is free when nobody states a budget."""
WORKSPACE_SHARE = 0.05
"""Of the computing tier's budget: a prompt is read in the largest chunks whose activations take no more beyond those of
the shortest."""


@dataclass(frozen=True)
class Pool:
    """How many experts' slices the cache of each tier holds."""

    name: str
    slot_bytes: int
    slots: dict[Tier, int]


@dataclass(frozen=True)
class Budgets:
    """What the user or the machine allows, in bytes. `gpu` is None where the CPU computes; `expert_cache` caps the
    computing tier's expert cache."""

    cpu: int
    gpu: int | None = None
    expert_cache: int | None = None


@dataclass(frozen=True)
class Item:
    """One line of a plan."""

    what: str
    tier: Tier
    nbytes: int
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """Which bytes go where. `chunk` is the most tokens one forward pass may have inside the workspace; `slot_bytes` are
    the first slice's."""

    model: str
    device: str
    dtype: str
    context: int
    chunk: int
    slot_bytes: int
    layers: int
    experts: int
    readers: int
    places: int
    cpu_mem_bytes: int
    gpu_mem_bytes: int | None
    cache_bytes: dict[Tier, int]
    pools: tuple[Pool, ...]
    items: tuple[Item, ...]
    work: Work | None = None
    link_bytes_per_s: float | None = None
    """The stated speed of an emulated link."""
    download_bytes: int = 0
    cpu: Mapping[str, Any] | None = None
    """What the CPU computes with: the level of its instructions, and whose kernels they are."""
    notes: tuple[str, ...] = field(default=())

    @property
    def computing_tier(self) -> Tier:
        """The tier whose cache the experts are computed from."""
        return Tier.CPU if self.gpu_mem_bytes is None else Tier.GPU

    def slots(self, tier: Tier, slice_: int = 0) -> int:
        """Experts of which the tier's cache holds that slice."""
        return self.pools[slice_].slots.get(tier, 0)

    def rows(self) -> list[tuple[str, str, int, str]]:
        """(what, tier, bytes, note) of every line, for a table."""
        return [(item.what, item.tier.value, item.nbytes, item.note) for item in self.items]

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain JSON types."""
        plan = asdict(self)
        plan["pools"] = [
            {"name": p.name, "slot_bytes": p.slot_bytes, "slots": {tier.value: n for tier, n in p.slots.items()}}
            for p in self.pools
        ]
        plan["cache_bytes"] = {tier.value: nbytes for tier, nbytes in self.cache_bytes.items()}
        plan["items"] = [{"what": i.what, "tier": i.tier.value, "bytes": i.nbytes, "note": i.note} for i in self.items]
        plan["notes"] = list(self.notes)
        return plan


def place(needs: Needs, budgets: Budgets, *, device: str, dtype: str) -> Plan:
    """Split `budgets` over what `needs` names. Raises BudgetError with the smallest budget that would do."""
    staging = needs.staging_bytes
    fixed = needs.dense_bytes + needs.kv_bytes + (needs.host_bytes if budgets.gpu is None else staging)
    chunk = _chunk(needs, budgets, fixed)
    resident = [
        ("dense weights", needs.dense_bytes, needs.dense_note),
        ("KV cache", needs.kv_bytes, f"{needs.context} tokens"),
        ("workspace", needs.workspace_bytes[chunk], f"{chunk} tokens a pass"),
    ]
    host = _host(needs)
    items: list[Item] = []
    slots: dict[Tier, list[int]] = {}
    if budgets.gpu is None:
        room = _room("--cpu-mem", budgets.cpu, resident + host, needs)
        items += _lines(Tier.CPU, resident + host)
        slots[Tier.CPU] = _divide(room, budgets.expert_cache, needs, host=True)
    else:
        on_gpu = [*resident, ("staging", staging, "for experts that are not cached")]
        room = _room("--gpu-mem", budgets.gpu, on_gpu, needs)
        if needs.beside_bytes:
            host.append(("the CPU's share", chunk * needs.beside_bytes, "of a pass, beside the accelerator"))
        host_room = _room("--cpu-mem", budgets.cpu, host, needs)
        items += _lines(Tier.GPU, on_gpu)
        slots[Tier.GPU] = _divide(room, budgets.expert_cache, needs, host=False)
        items += _cache_lines(Tier.GPU, slots[Tier.GPU], needs)
        items += _lines(Tier.CPU, host)
        slots[Tier.CPU] = _divide(host_room, None, needs, host=True)
    items += _cache_lines(Tier.CPU, slots[Tier.CPU], needs)
    items.append(Item("experts", Tier.DISK, needs.expert_bytes, f"{needs.experts} in {needs.layers} layers"))
    return Plan(
        model=needs.model,
        device=device,
        dtype=dtype,
        context=needs.context,
        chunk=chunk,
        slot_bytes=needs.slices[0].slot_bytes,
        layers=needs.layers,
        experts=needs.experts,
        readers=needs.readers,
        places=needs.places,
        cpu_mem_bytes=budgets.cpu,
        gpu_mem_bytes=budgets.gpu,
        cache_bytes={
            tier: sum(n * each.slot_bytes for n, each in zip(counts, needs.slices, strict=True))
            for tier, counts in slots.items()
        },
        pools=tuple(
            Pool(each.name, each.slot_bytes, {tier: counts[i] for tier, counts in slots.items()})
            for i, each in enumerate(needs.slices)
        ),
        items=tuple(items),
        work=needs.work,
    )


def choose_context(context: int | None, max_context: int | None) -> int:
    """The context to plan for, in tokens. Raises ContextError for one longer than the model's, or below 1."""
    if context is None:
        return min(DEFAULT_CONTEXT, max_context or DEFAULT_CONTEXT)
    if context < 1:
        raise ContextError(f"--context {context}: a context has at least one token")
    if max_context is not None and context > max_context:
        raise ContextError(f"--context {context}: the model was made for at most {max_context} tokens: ask for no more")
    return context


def _host(needs: Needs) -> list[tuple[str, int, str]]:
    """What is in host memory wherever experts are computed."""
    whole = [each for each in needs.slices if each.whole]
    return [
        ("process", needs.process_bytes + GROWTH_BYTES, "Python, torch, transformers"),
        ("transfer buffers", needs.transfer_bytes, f"{needs.readers} reads at once"),
        *((f"all experts at {each.name}", needs.experts * each.slot_bytes, "for the fallback") for each in whole),
    ]


def _chunk(needs: Needs, budgets: Budgets, fixed: int) -> int:
    """The most tokens a pass may have: what it takes beyond the shortest is a small share of the computing tier's
    budget, and all that is `fixed` there still fits, as does what the CPU takes beside an accelerator."""
    budget = budgets.cpu if budgets.gpu is None else budgets.gpu
    allowed = min(min(needs.workspace_bytes.values()) + WORKSPACE_SHARE * budget, budget - fixed)
    longest = max(needs.workspace_bytes)
    if budgets.gpu is not None and needs.beside_bytes:
        longest = (budgets.cpu - needs.host_bytes) // needs.beside_bytes
    fitting = [chunk for chunk, nbytes in needs.workspace_bytes.items() if nbytes <= allowed and chunk <= longest]
    return max(fitting, default=min(needs.workspace_bytes))


def _room(flag: str, budget: int, fixed: Sequence[tuple[str, int, str]], needs: Needs) -> int:
    """Bytes left for experts after everything that must be there."""
    total = sum(nbytes for _, nbytes, _ in fixed)
    if total > budget:
        workspace = {name: nbytes for name, nbytes, _ in fixed}.get("workspace", 0)
        least = total - workspace + (min(needs.workspace_bytes.values()) if workspace else 0)
        parts = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes, _ in fixed)
        raise BudgetError(
            f"{flag} {format_bytes(budget)} is too small for {needs.model}: it needs {parts}; "
            f"the smallest that works is {flag} {-(-least // (16 * MIB)) * 16}M"
            + (", less with a shorter --context" if workspace else "")
        )
    return budget - total


def _divide(room: int, cap: int | None, needs: Needs, *, host: bool) -> list[int]:
    """Slots of each slice in `room`, at most one for each expert. What has to be whole has its place on the host."""
    held = [needs.experts if each.whole and host else 0 for each in needs.slices]
    sizes, shares = [each.slot_bytes for each in needs.slices], [each.share for each in needs.slices]
    return divide(room if cap is None else min(room, cap), needs.experts, sizes, shares, held)


def _cache_lines(tier: Tier, counts: Sequence[int], needs: Needs) -> list[Item]:
    return [
        Item(
            "expert cache" if len(counts) == 1 else f"expert cache, {each.name}",
            tier,
            count * each.slot_bytes,
            f"{count} of {needs.experts} experts, {format_bytes(each.slot_bytes)} each",
        )
        for count, each in zip(counts, needs.slices, strict=True)
        if tier is not Tier.CPU or not each.whole
    ]


def _lines(tier: Tier, parts: Sequence[tuple[str, int, str]]) -> list[Item]:
    return [Item(what, tier, nbytes, note) for what, nbytes, note in parts]
