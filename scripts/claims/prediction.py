"""Claims about what can be known of the next layers."""

from __future__ import annotations

from functools import cache
from typing import Any

from cache.traces.trace import Trace
from predictors.base import find_predictor, make_predictor
from predictors.evaluate import evaluate
from scripts.claims.claim import claim, row
from scripts.claims.workloads import Workload


def recall(work: Workload, predictor: str, cut: str = "K", *, phase: str = "decode") -> list[float | None]:
    """Of a predictor one, two and three layers ahead, on the held-out sequences."""
    found: dict[str, Any] | None = _evaluated(work, predictor)
    found = found if found is None or phase == "decode" else found["prefill"]
    return [None] * 3 if found is None else [found["recall"][str(ahead)][cut] for ahead in (1, 2, 3)]


@cache
def _evaluated(work: Workload, predictor: str) -> dict[str, Any]:
    profile = Trace.open(work.learnt) if find_predictor(predictor).can_learn else None
    shape = work.whole.num_layers, work.whole.num_experts
    return evaluate(make_predictor(predictor, *shape, profile), work.held_out, min(3, shape[0])).as_dict()


@claim(
    "Fate",
    "2502.12224",
    "the next gate, asked with this gate's input, says nearly all",
    theirs="one layer ahead: 78.8 to 84.0 % at K, 97.2 % of what it fetches (K and some more); while reading "
    "prompts over 99.6 % (Qwen1.5-MoE, DeepSeek-MoE)",
    ours="recall one layer ahead at K / K+2 / 2K; while reading prompts at K",
    command="offload predict T --predictor cross-layer-gate",
    why="K of 32 experts is 4 here, so K+2 is half as many again; a small model changes more in a layer",
)
def gates(work: Workload) -> str | None:
    if work.whole.predicted is None:
        return None
    at = [recall(work, "cross-layer-gate", cut)[0] for cut in ("K", "K+2", "2K")]
    return f"{row(*at)}; {row(recall(work, 'cross-layer-gate', phase='prefill')[0])}"


@claim(
    "HOBBIT",
    "2411.01433",
    "gates say something of the layers after the next, too",
    theirs="the strongest expert: 96 % one layer ahead, about 90 % two and three (Mixtral)",
    ours="recall at K / K+2, one, two and three layers ahead",
    command="offload predict T --predictor cross-layer-gate",
)
def gates_farther(work: Workload) -> str | None:
    if work.whole.predicted is None:
        return None
    pairs = zip(recall(work, "cross-layer-gate"), recall(work, "cross-layer-gate", "K+2"), strict=True)
    return "; ".join(row(*pair) for pair in pairs)


@claim(
    "ProMoE",
    "2410.22134",
    "a learned predictor beats the gates",
    theirs="84.7 % on average; the gate of the layer after next 66.9 % (Qwen2-57B)",
    ours="learned from ids and scores / the gates / a regression fitted while running; recall at K, one ahead",
    command="offload predict T --predictor learned,cross-layer-gate,logistic --profile P",
    why="theirs are networks of 2 million weights that see hidden states; ours sees what a trace has",
)
def learned(work: Workload) -> str:
    found = [recall(work, name)[0] for name in ("learned", "cross-layer-gate", "logistic")]
    return row(*(each or None for each in found))


@claim(
    "SeqMoE",
    "2609.12978",
    "what all layers did says the next passes",
    theirs="90.9 % at K+3, 3.6 points less eight steps ahead (Mamba over whole activations)",
    ours="the union of gates and a regression: recall at K / K+2, one ahead",
    command="offload predict T --predictor ensemble --profile P",
)
def ensemble(work: Workload) -> str:
    return row(recall(work, "ensemble")[0], recall(work, "ensemble", "K+2")[0])


@claim(
    "EdgeMoE",
    "2308.14352",
    "pairs of layers before say the next one",
    theirs="a table of the experts of two layers; no accuracy published",
    ours="transitions of one layer / of two, recall at K, one ahead",
    command='offload predict T --predictor "transition,transition(order=2)" --profile P',
)
def transitions(work: Workload) -> str:
    return row(recall(work, "transition(reach=1)")[0], recall(work, "transition(order=2, reach=1)")[0])


@claim(
    "MoE-Infinity",
    "2401.14361",
    "sequences like this one say what it will use",
    theirs="an activation matrix's nearest neighbour (figures of speed alone)",
    ours="recall at K, one ahead: of the nearest sequence / of popularity",
    command="offload predict T --predictor activation-matrix,frequency --profile P",
    why="it names one set for a whole sequence; where sequences are alike that is popularity",
)
def activation_matrices(work: Workload) -> str:
    return row(recall(work, "activation-matrix")[0], recall(work, "frequency")[0])


@claim(
    "FineMoE",
    "2502.05370",
    "maps by trajectory and embedding say more than counts",
    theirs="hits before MoE-Infinity and ProMoE (figure)",
    ours="recall at K, one, two and three ahead, of the nearest map / of the 16 nearest",
    command='offload predict T --predictor "expert-map(nearest=1),expert-map" --profile P',
)
def maps(work: Workload) -> str:
    pairs = zip(recall(work, "expert-map(nearest=1)"), recall(work, "expert-map"), strict=True)
    return "; ".join(row(*pair) for pair in pairs)


@claim(
    "OpenMoE",
    "2402.01739",
    "a token's id decides where it goes",
    theirs="routing is settled early, and by the token rather than by what stands before it (figures)",
    ours="recall at K, one ahead, by ids / by the pass before / by both and an embedding",
    command="offload predict T --predictor token-ids,frequency,path --profile P",
    why="the trace of gpt-oss has no tokens",
)
def token_ids(work: Workload) -> str | None:
    if work.whole.ids is None:
        return None
    return row(*(recall(work, name)[0] for name in ("token-ids", "frequency", "path")))
