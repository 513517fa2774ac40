"""The trace: how the exported model routes held-out text, read a stretch at once and then token by token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from cache.traces.trace import Trace
from offload import OffloadedModel
from offload.system.progress import progress_bar
from scripts.mixture.tokens import Tokens

NAME = "mixture"  # what the trace calls the model
PROMPT = 32  # tokens that are read at once; those that follow count as decoded
AHEAD = 3  # layers of which the gates are asked ahead


def stretches(held: dict[str, Tokens], tokens: int, length: int) -> list[torch.Tensor]:
    """So many sequences of `length` that they have `tokens` together, spread over the sources."""
    found: list[torch.Tensor] = []
    texts, count = list(held.values()), tokens // length
    used = [0] * len(texts)
    for turn in range(count):
        source = (2 * turn + 1) * len(texts) // (2 * count)
        text = texts[source][used[source] : used[source] + length]
        used[source] += length
        found.append(torch.from_numpy(text.astype("int64")))
    return found


@torch.no_grad()
def record(checkpoint: Path, sequences: list[torch.Tensor], path: Path, workload: str) -> int:
    """Write the trace of `sequences` to `path`, with all scores, what the next gates say, and the tokens; returns its
    bytes."""
    with OffloadedModel.from_pretrained(checkpoint) as model:
        recording = model.record_trace(
            path,
            scores=True,
            predicted=min(AHEAD, model.plan.layers - 1),
            inputs=True,
            workload=workload,
            overwrite=True,
        )
        with recording as recorder, progress_bar("recording", sum(map(len, sequences))) as bar:
            for ids in sequences:
                kept = None
                for part in (ids[:PROMPT], *ids[PROMPT:].split(1)):
                    kept = model(part[None], past_key_values=kept, use_cache=True).past_key_values
                    bar.advance(len(part))
                recorder.keep()
    found = Trace.open(path)
    replace(found, metadata={**found.metadata, "model": NAME}).write(path)  # not by where it happened to lie
    return path.stat().st_size
