"""Where cached experts' bytes lie: which of a tier's slots holds which slice of which expert. Moves no bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from cache.types import ExpertKey, Tier
from offload.device.arena import Slots


class Places:
    """The slots of each tier, by slice, and who is in them. For the computing thread."""

    def __init__(self, slots: Mapping[Tier, Sequence[Slots]]) -> None:
        self._slots = {tier: list(of_slices) for tier, of_slices in slots.items()}
        self._held: dict[tuple[Tier, int, ExpertKey], torch.Tensor] = {}

    def slot(self, tier: Tier, slice_: int, key: ExpertKey) -> torch.Tensor:
        """Where an expert's slice is. Raises KeyError if it has no place."""
        return self._held[tier, slice_, key]

    def held(self, tier: Tier, slice_: int) -> set[ExpertKey]:
        """The experts that have a place there."""
        return {key for at, index, key in self._held if (at, index) == (tier, slice_)}

    def take(self, tier: Tier, slice_: int, key: ExpertKey) -> torch.Tensor:
        """Give an expert's slice a place. Raises RuntimeError if it has one already, or if there is none."""
        if (tier, slice_, key) in self._held:
            raise RuntimeError(f"{key} has a place in {tier.value} memory already")
        slot = self._held[tier, slice_, key] = self._slots[tier][slice_].take()
        return slot

    def give(self, tier: Tier, slice_: int, keys: Iterable[ExpertKey]) -> None:
        """Take the places of these experts back."""
        slots = self._slots[tier][slice_]
        for key in keys:
            slots.give(self._held.pop((tier, slice_, key)))

    def give_all(self) -> None:
        """Take every place back, whatever state this is in."""
        self._held.clear()
        for of_slices in self._slots.values():
            for slots in of_slices:
                slots.give_all()

    def clear(self) -> None:
        """Forget the slots, so that their memory can be given back."""
        self._held.clear()
        self._slots.clear()
