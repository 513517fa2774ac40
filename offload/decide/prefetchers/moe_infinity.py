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
        nearness = [1 - lead / layers for lead in range(layers + 1)]
        expected = [each for each in outlook.known.predicted.values() if each.lead_layers <= left]
        expected.sort(key=lambda each: -each.probability * nearness[each.lead_layers])
        unused = {key for key, _ in outlook.known.unused}
        for prediction in expected:  # nothing expected is evicted meanwhile, so what is absent can be asked one by one
            if not outlook.is_absent(prediction):
                continue
            offer = outlook.offer(prediction)
            if offer.begins_s >= outlook.starts_s(1):
                return
            if offer.find_room(unused):
                offer.begin()
