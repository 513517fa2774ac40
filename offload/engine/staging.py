"""Staging places on the accelerator, for experts that no cache there admits.

Where experts have several slices, an expert that has a place has one for each of them, and places are given in the
order in which experts were submitted, wherever their slices come from: so no two experts wait for each other.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from cache.types import ExpertKey
from offload.device.base import Device
from offload.engine.journey import Bundle, Transfer


class DeviceStaging:
    """The computing thread announces transfers and releases bundles; the link's thread gives bundles out.

    `slots` are listed by slice.
    """

    def __init__(self, device: Device, slots: Sequence[Sequence[torch.Tensor]]) -> None:
        self._device = device
        self._slices = len(slots)
        self._closed = False
        # What was given to the device before may still read them.
        self._bundles = [Bundle(each, fence=device.fence()) for each in zip(*slots, strict=True)]
        self._bundle_of: dict[ExpertKey, Bundle] = {}
        self._unstaged: dict[ExpertKey, int] = {}  # transfers that will need a bundle, by expert, in order of coming
        self._bundle_free = threading.Condition()  # guards all three

    def needed_by(self, transfer: Transfer) -> bool:
        """Whether a transfer goes to the accelerator and has no place there."""
        return self._device.is_accelerator and not transfer.fetch.to_host and transfer.device is None

    def announce(self, transfer: Transfer) -> None:
        """A transfer that will need a place was submitted."""
        with self._bundle_free:
            self._unstaged[transfer.fetch.key] = self._unstaged.get(transfer.fetch.key, 0) + 1

    def withdraw(self, key: ExpertKey) -> None:
        """One transfer of this expert needs no place any more: it has one, or has failed."""
        with self._bundle_free:
            self._unstaged[key] -= 1
            if not self._unstaged[key]:
                del self._unstaged[key]

    def stage(self, transfer: Transfer) -> bool:
        """See that a transfer has a place on the device. False where it must let others pass, among which may be the
        other slices of the experts that have the places; and once this is closed."""
        if not self.needed_by(transfer):
            return True
        key = transfer.fetch.key
        with self._bundle_free:
            bundle = self._bundle_of.get(key)
            if bundle is None:
                if self._slices > 1:
                    if len(self._bundles) <= self._before(key):
                        return False
                else:
                    while not self._bundles and not self._closed:
                        self._bundle_free.wait()
                if self._closed:
                    return False
                bundle = self._bundle_of[key] = self._bundles.pop(0)
            bundle.used += 1
            self.withdraw(key)
        transfer.device_staging = bundle
        transfer.device, transfer.fence = bundle.slots[transfer.fetch.slice], bundle.fence
        return True

    def release(self, key: ExpertKey, bundle: Bundle) -> None:
        """All work on a slice in `bundle` was given to the device."""
        with self._bundle_free:
            bundle.used -= 1
            bundle.fence = self._device.fence()
            if not bundle.used:
                del self._bundle_of[key]
                self._bundles.append(bundle)
                self._bundle_free.notify()

    def close(self) -> None:
        """Let nobody wait for a place."""
        with self._bundle_free:
            self._closed = True
            self._bundle_free.notify_all()

    def clear(self) -> None:
        """Forget the places, so that their memory can be given back."""
        self._bundles.clear()

    def _before(self, key: ExpertKey) -> int:
        """How many experts came before this one and have no bundle yet: for each of them one is kept."""
        waiting = [each for each in self._unstaged if each not in self._bundle_of]
        return waiting.index(key)
