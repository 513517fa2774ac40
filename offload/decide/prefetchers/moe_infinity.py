"""All layers to the last, by how likely and how near."""

from __future__ import annotations

from offload.decide.prefetchers.base import Outlook, PrefetchRule, register


@register
class MoEInfinity(PrefetchRule):
    """Everything expected up to the last layer of the pass, by p * (1 - distance / layers), without a price.

    The original's queue is sorted anew at every layer. Here a layer begins as much of it as the channels bring until
    the next one, which begins the rest, if that is still first.

    Source: Xue et al., MoE-Infinity, arXiv 2401.14361.
    """

    name = "moe-infinity"
    reach = 0

    def choose(self, outlook: Outlook) -> None:
        layers = outlook.known.num_layers
        left = min(outlook.depth, layers - 1 - outlook.event.layer)
        absent = [prediction for lead in range(1, left + 1) for prediction in outlook.absent(lead)]
        absent.sort(key=lambda each: -each.probability * (1 - each.lead_layers / layers))
        unused = {key for key, _ in outlook.known.unused}
        for prediction in absent:
            offer = outlook.offer(prediction)
            if offer.begins_s >= outlook.starts_s(1):
                return
            if offer.find_room(unused):
                offer.begin()
