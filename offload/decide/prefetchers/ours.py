"""What gains more than it may cost, the nearest layer first."""

from __future__ import annotations

from offload.decide.prefetchers.base import Outlook, PrefetchRule, register


@register
class Ours(PrefetchRule):
    """A fetch is worth it if it can begin before its layer does, and gains more than it may lose.

        gain = p * (part of the transfer that is hidden) * (makespan of the layer without it - with it)
        loss = (1 - p) * (how often an expert evicted for a prefetch is soon missed) * (its transfer)

    Source: the gain of HybriMoE, arXiv 2504.05897, times what of it can be expected; the loss is this project's.
    """

    name = "ours"

    def choose(self, outlook: Outlook) -> None:
        known, top_k = outlook.known, outlook.top_k
        for lead in range(1, outlook.depth + 1):
            absent = outlook.absent(lead)
            expected = sum(prediction.probability for prediction in absent)
            for prediction in absent:
                offer = outlook.offer(prediction)
                slack_s = outlook.starts_s(lead) - offer.begins_s
                if slack_s <= 0 or not offer.fetch_s:
                    continue
                missing = min(max(round(expected), 1), top_k)
                saved_s = known.makespans.saved_s(top_k, missing, outlook.expert_s, offer.fetch_s)
                gain_s = prediction.probability * min(slack_s / offer.fetch_s, 1.0) * saved_s
                if gain_s <= 0 or not offer.find_room():
                    continue
                if offer.evicts and gain_s <= (1 - prediction.probability) * known.regret() * offer.fetch_s:
                    continue
                offer.begin()
                expected -= prediction.probability
