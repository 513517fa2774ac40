"""The examples in transformers' docstrings run unchanged on our model, and give what they give on the resident one.

docs/python.md lists them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import documented
import pytest
import tiny

from offload.model import OffloadedModel

STREAMERS = "AsyncTextIteratorStreamer TextIteratorStreamer TextStreamer"
PROCESSORS = """
    EncoderNoRepeatNGramLogitsProcessor EncoderRepetitionPenaltyLogitsProcessor EpsilonLogitsWarper EtaLogitsWarper
    ExponentialDecayLengthPenalty ForcedEOSTokenLogitsProcessor LogitNormalization MinLengthLogitsProcessor
    MinNewTokensLengthLogitsProcessor MinPLogitsWarper NoBadWordsLogitsProcessor NoRepeatNGramLogitsProcessor
    PrefixConstrainedLogitsProcessor RepetitionPenaltyLogitsProcessor SequenceBiasLogitsProcessor
    SynthIDTextWatermarkLogitsProcessor TemperatureLogitsWarper TopHLogitsWarper TopKLogitsWarper TopPLogitsWarper
    TypicalLogitsWarper UnbatchedClassifierFreeGuidanceLogitsProcessor
"""
EXAMPLES = [
    *(f"generation.streamers:{name}" for name in STREAMERS.split()),
    *(f"generation.logits_process:{name}" for name in PROCESSORS.split()),
    "generation.stopping_criteria:StopStringCriteria",
    "generation.utils:GenerationMixin.compute_transition_scores",
    "generation.watermarking:WatermarkDetector",
    "generation.configuration_utils:SynthIDTextWatermarkingConfig",
    "cache_utils:DynamicCache",
    "cache_utils:StaticCache",
    "models.qwen2_moe.modeling_qwen2_moe:Qwen2MoeForCausalLM.forward",
]
"""All that load a causal language model and run without a GPU, other models or data, on the resident model at all."""

# They are transformers' code and texts, and so are their warnings.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return documented.save(tmp_path_factory.mktemp("documented"), [documented.docstring(name) for name in EXAMPLES])


@pytest.fixture(scope="module")
def pair(checkpoint: Path) -> Iterator[tuple[Any, OffloadedModel]]:
    """The resident model, and ours with a fifth of its experts cached."""
    resident = tiny.resident(checkpoint)
    resident.generation_config.length_penalty = 1.0  # an example divides by it
    with tiny.open_model(checkpoint, expert_cache=8 * tiny.SLOT, context=1024) as model:
        model.generation_config.length_penalty = 1.0
        yield resident, model


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_gives_what_it_gives_on_the_resident_model(
    name: str, pair: tuple[Any, OffloadedModel], checkpoint: Path
) -> None:
    code = documented.source(name)
    assert "model(" in code or "model.generate" in code
    (printed, expected), (ours, tensors) = (documented.run(code, model, checkpoint) for model in pair)
    assert ours == printed
    assert tensors.keys() == expected.keys()
    for key, values in tensors.items():
        assert len(values) == len(expected[key]) and all(map(tiny.same_bits, values, expected[key])), key
