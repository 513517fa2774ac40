"""Records the routing of a running model as a trace.

The runtime says when a forward pass begins and ends, the experts function hands over what each layer's router chose.
Only whole passes count. A pass with an empty KV cache begins new sequences, one for each row of its batch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cache.errors import TraceError
from cache.traces.trace import DECODE, PADDING, PREFILL, describe, expert_dtype
from cache.traces.writer import Rows, TraceWriter
from cache.types import Phase
from offload.checkpoint.layout import ExpertLayer, ExpertMap
from offload.layers.lookahead import GateLookahead
from offload.layers.opening import SKETCH, Openings
from offload.layers.router import RouterScores, half_precision


class TraceRecorder:
    """Writes one trace. `OffloadedModel.record_trace` makes one; the runtime feeds it.

    What is recorded is what ran: with padding, which is routed as well and marked as padding, and in the order of
    running. What is no plain sequence raises TraceError while generating: beams, assisted decoding, KV caches
    that were cropped or that the recording did not see from the beginning.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: Any,
        experts: ExpertMap,
        metadata: Mapping[str, str],
        *,
        scores: bool = False,
        predicted: int = 0,
        inputs: bool = False,
    ) -> None:
        self._layers = experts.layers
        self._num_experts = experts.num_experts
        self._dtype = expert_dtype(experts.num_experts)
        self._metadata = dict(metadata)
        self._path = path
        self._writer: TraceWriter | None = None
        self._ends: frozenset[int] = frozenset()
        self._prompt_tokens = 0
        self._next_sequence = self._forward = 0
        self._sequences: NDArray[np.int64] | None = None  # those under way
        self._length = self._step = 0
        self._finished: NDArray[np.bool_] = np.zeros(0, bool)
        self._phase: NDArray[np.uint8] | None = None  # of the pass under way, [rows, new tokens]
        self._routed: dict[int, tuple[NDArray[Any], NDArray[np.float32]]] = {}
        self._seen: dict[int, NDArray[np.float16]] = {}
        self._said: dict[int, NDArray[np.unsignedinteger[Any]]] = {}
        self._read: tuple[NDArray[np.int32], NDArray[np.float16]] | None = None
        self._depth = predicted
        self._scores: RouterScores | None = None
        self._gates: GateLookahead | None = None
        self._openings: Openings | None = None
        try:
            if scores:
                self._scores = RouterScores(model, experts, self._receive_scores)
            if predicted:
                self._gates = GateLookahead(model, experts, predicted, self._receive_ahead)
            if inputs:
                self._openings = Openings(model, self._receive_opening)
        except TraceError:
            self._detach()
            raise

    @property
    def num_sequences(self) -> int:
        """Finished sequences so far: they will be in the trace."""
        return 0 if self._writer is None else self._writer.kept_sequences

    def begin_generation(self, prompt_tokens: int, config: Any, kwargs: Mapping[str, Any]) -> None:
        """`generate` starts. Raises TraceError for what has no plain sequences."""
        if (config.num_beams or 1) > 1:
            raise TraceError(
                f"beam search ({config.num_beams} beams) exchanges its sequences as it goes: it cannot be recorded"
            )
        if kwargs.get("assistant_model") is not None or getattr(config, "prompt_lookup_num_tokens", None):
            raise TraceError("assisted decoding takes tokens back as it goes: it cannot be recorded")
        self._prompt_tokens = prompt_tokens
        ends = config.eos_token_id
        ends = ends.flatten().tolist() if isinstance(ends, torch.Tensor) else ends
        self._ends = frozenset([ends] if isinstance(ends, int) else ends or ())
        # A row that ended otherwise is fed this one while the others go on.
        if isinstance(config.pad_token_id, int):
            self._ends |= {config.pad_token_id}

    def end_generation(self) -> None:
        """`generate` returned: its sequences are finished."""
        self._ends = frozenset()
        self.keep()

    def begin_pass(self, ids: torch.Tensor, mask: Any, length: int, phase: Phase) -> None:
        """A forward pass of `ids` (or embeddings) [rows, new, ...] starts, with `length` tokens in the KV cache.

        `mask` is its attention mask. Raises TraceError where it does not go on with what was recorded.
        """
        rows, new = ids.shape[:2]
        if self._phase is not None:  # the one before never ended
            self._abandon()
        if length == 0:
            self.keep()
            self._sequences = np.arange(rows) + self._next_sequence
            self._next_sequence += rows
            self._length = self._step = 0
            self._finished = np.zeros(rows, bool)
        elif self._sequences is None or len(self._sequences) != rows or self._length != length:
            recorded = "nothing" if self._sequences is None else f"{len(self._sequences)} of {self._length}"
            self._abandon()
            raise TraceError(
                f"the pass goes on with {rows} sequences of {length} tokens, recorded is {recorded}: "
                "record from the beginning of a sequence, one batch after the other"
            )
        token_phase = np.full((rows, new), DECODE if phase is Phase.DECODE else PREFILL, np.uint8)
        token_phase[_padding(mask, rows, length, new)] = PADDING
        if rows > 1 and self._ends and new == 1 and length >= self._prompt_tokens and not ids.is_floating_point():
            # In a batch, rows that have ended are fed the end and then padding until the last one ends.
            self._finished |= np.isin(ids[:, 0].cpu().numpy(), list(self._ends))
            token_phase[self._finished] = PADDING
        self._phase = token_phase
        self._routed, self._seen, self._said, self._read = {}, {}, {}, None

    def record(self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> None:
        """What layer `layer` routed in this pass: ids and weights [tokens, K]. Raises TraceError for a second time."""
        if self._phase is None:
            return
        if layer in self._routed or len(top_k_index) != self._phase.size:
            tokens = self._phase.size
            self._abandon()
            raise TraceError(
                f"MoE layer {layer} ran twice in a pass, or routed {len(top_k_index)} of its {tokens} tokens: "
                "such a model cannot be recorded"
            )
        # Copies, and small ones: a prompt's are held until its pass ends.
        weights = top_k_weights.detach().to("cpu", torch.float32, copy=True).numpy()
        experts = top_k_index.cpu().numpy().astype(self._dtype)
        order = np.argsort(-weights, axis=-1, kind="stable")
        self._routed[layer] = np.take_along_axis(experts, order, -1), np.take_along_axis(weights, order, -1)

    def end_pass(self, complete: bool) -> None:
        """The pass is over, or (not `complete`) failed, which ends its sequences without a trace."""
        phase, sequences = self._phase, self._sequences
        if phase is None or sequences is None:
            return
        ran = len(self._routed)
        if self._scores is not None:
            ran = min(ran, len(self._seen))
        if self._gates is not None:
            ran = min(ran, len(self._said) + 1)  # behind the last layer there is nothing to ask
        if not complete or ran < len(self._layers):
            self._abandon()
            if complete:
                raise TraceError(f"{ran} of {len(self._layers)} MoE layers ran in a pass: it cannot be recorded")
            return
        if self._openings is not None and self._read is None:
            self._abandon()
            raise TraceError("a pass was given embeddings instead of tokens: what it reads cannot be recorded")
        ids, embeddings = self._read or (None, None)
        layers = range(len(self._layers))
        experts = np.stack([self._routed[layer][0] for layer in layers], 1)  # [tokens, L, K]
        self._open_writer(experts.shape[-1]).append(
            Rows(
                sequence=np.repeat(sequences, phase.shape[1]),
                forward=self._forward,
                step=self._step,
                phase=phase.ravel(),
                experts=experts,
                weights=np.stack([self._routed[layer][1] for layer in layers], 1),
                scores=None if self._scores is None else np.stack([self._seen[layer] for layer in layers], 1),
                predicted=None if self._gates is None else self._predictions(experts.shape[-1]),
                ids=ids,
                embeddings=embeddings,
            )
        )
        self._phase = None
        self._forward += 1
        self._step += 1
        self._length += phase.shape[1]

    def keep(self) -> None:
        """The sequences under way are finished."""
        if self._writer is not None:
            self._writer.keep()

    def close(self, *, keep_unfinished: bool) -> int:
        """Write the trace; gives the number of its sequences. Without one there is no trace."""
        self._detach()
        if self._phase is not None:
            self._abandon()
        if self._writer is None:
            return 0
        if keep_unfinished:
            self._writer.keep()
        sequences = self._writer.kept_sequences
        self._writer.finish()
        return sequences

    def _open_writer(self, top_k: int) -> TraceWriter:
        if self._writer is None:
            shape = describe(len(self._layers), self._num_experts, top_k, _model_layers(self._layers))
            function = {} if self._scores is None else {"score_function": self._scores.function or ""}
            self._writer = TraceWriter(
                self._path,
                {**self._metadata, **shape, **function},
                scores=self._scores is not None,
                predicted=None if self._gates is None else (self._depth, self._candidates(top_k)),
                embeddings=0 if self._openings is None else SKETCH,
            )
        return self._writer

    def _candidates(self, top_k: int) -> int:
        """How many experts a gate names ahead."""
        return min(2 * top_k, self._num_experts)

    def _predictions(self, top_k: int) -> NDArray[np.unsignedinteger[Any]]:
        """What the gates said in this pass, [tokens, L, D, P]; 0 where no layer follows."""
        assert self._phase is not None
        shape = (self._phase.size, len(self._layers), self._depth, self._candidates(top_k))
        predicted = np.zeros(shape, self._dtype)
        for layer, said in self._said.items():
            predicted[:, layer, : said.shape[1]] = said
        return predicted

    def _receive_scores(self, layer: int, scores: torch.Tensor) -> None:
        if self._phase is not None:
            self._seen[layer] = half_precision(scores)

    def _receive_ahead(self, layer: int, predicted: NDArray[np.unsignedinteger[Any]]) -> None:
        if self._phase is not None:
            self._said[layer] = predicted

    def _receive_opening(self, ids: torch.Tensor, embeddings: NDArray[np.float16]) -> None:
        if self._phase is not None and self._read is None and len(ids) == self._phase.size:
            self._read = ids.to(torch.int32).numpy(), embeddings

    def _detach(self) -> None:
        for hooks in (self._scores, self._gates, self._openings):
            if hooks is not None:
                hooks.detach()

    def _abandon(self) -> None:
        self._phase = self._sequences = None
        if self._writer is not None:
            self._writer.drop()


def _padding(mask: Any, rows: int, length: int, new: int) -> NDArray[np.bool_]:
    """Which of a pass's tokens are padding, [rows, new], as the attention mask says."""
    if (
        isinstance(mask, torch.Tensor)
        and mask.dim() == 2
        and len(mask) == rows
        and mask.shape[1] in (length + new, new)
    ):
        return np.asarray(mask[:, -new:].cpu().numpy() == 0)
    if rows > 1 and mask is not None:
        raise TraceError(
            "which tokens of the batch are padding cannot be told from its attention mask: "
            "give a mask of [sequences, tokens], or one sequence at a time"
        )
    return np.zeros((rows, new), bool)


def _model_layers(layers: Sequence[ExpertLayer]) -> list[int]:
    """The model's layer index of each MoE layer: the first number in its path."""
    found = [re.search(r"\d+", layer.path) for layer in layers]
    numbers = [int(match.group()) if match else -1 for match in found]
    return numbers if numbers == sorted(set(numbers)) and numbers[0] >= 0 else list(range(len(layers)))
