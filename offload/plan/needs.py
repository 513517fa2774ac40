"""What a model asks for, whatever the budgets: bytes by what they are for. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from offload.plan.work import Work

GROWTH_BYTES = 96 * 2**20
"""What the process grows by after the plan is made: allocator slack, threads, code that is loaded on first use."""


@dataclass(frozen=True)
class SliceNeeds:
    """One slice that every expert has: what one takes in memory, and its `share` of the memory for experts.

    `whole`: all experts' slices stay in host memory, whatever the budget is.
    """

    name: str
    slot_bytes: int
    share: float = 1.0
    whole: bool = False


@dataclass(frozen=True)
class Needs:
    """What a model asks for, whatever the budgets: bytes, from its configuration and its shards' headers.

    `workspace_bytes` maps tokens of one pass to the bytes of its activations. `reader_bytes` is host memory for one
    of `readers` beside staging, which has `places` for experts on their way. `beside_bytes` is host memory for
    each token of a pass, where the CPU computes experts beside an accelerator.
    """

    model: str
    context: int
    max_context: int | None
    dense_bytes: int
    kv_bytes: int
    workspace_bytes: dict[int, int]
    layers: int
    experts: int
    slices: tuple[SliceNeeds, ...]
    expert_bytes: int
    reader_bytes: int
    readers: int
    places: int
    process_bytes: int
    beside_bytes: int = 0
    dense_note: str = "all that is no expert"
    work: Work | None = None
    """None where it is not known how many experts a token goes to."""

    @property
    def staging_bytes(self) -> int:
        """A slot of every slice for each place."""
        return self.places * sum(each.slot_bytes for each in self.slices)

    @property
    def whole_bytes(self) -> int:
        """What stays in host memory of every expert."""
        return self.experts * sum(each.slot_bytes for each in self.slices if each.whole)

    @property
    def transfer_bytes(self) -> int:
        """What reading takes in host memory, staging included."""
        return self.readers * self.reader_bytes + self.staging_bytes

    @property
    def host_bytes(self) -> int:
        """What is in host memory wherever experts are computed."""
        return self.process_bytes + GROWTH_BYTES + self.transfer_bytes + self.whole_bytes
