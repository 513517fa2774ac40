"""As many of a map's experts as its likeness asks for, by how likely and how near."""

from __future__ import annotations

from offload.decide.prefetchers.base import Outlook, PrefetchRule, register
from predictors.base import Prediction


@register
class FineMoE(PrefetchRule):
    """Of each layer the likeliest experts, at least as many as the router chooses, and more the less the map that they
    come from is like the present: until their probabilities come to 1 - likeness. Then all of them by p / distance.

    Where a predictor does not say how like its source is, that is 0.5.

    Source: Yu et al., FineMoE (fMoE), arXiv 2502.05370.
    """

    name = "finemoe"
    reach = 3
    least = 0.0

    def choose(self, outlook: Outlook) -> None:
        similarity = outlook.known.similarity
        asked = min(max(1 - (0.5 if similarity is None else similarity), 0.0), 1.0)
        chosen: list[Prediction] = []
        for lead in range(1, outlook.depth + 1):
            total = 0.0
            for count, prediction in enumerate(outlook.expected(lead)):
                if total >= asked and count >= outlook.top_k:
                    break
                total += prediction.probability
                if outlook.is_absent(prediction):
                    chosen.append(prediction)
        chosen.sort(key=lambda each: -each.probability / each.lead_layers)
        for prediction in chosen:
            offer = outlook.offer(prediction)
            if offer.begins_s < outlook.starts_s(prediction.lead_layers) and offer.find_room():
                offer.begin()
