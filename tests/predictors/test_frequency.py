"""Faded frequencies of use, by hand."""

from __future__ import annotations

from workload import event, make, passes, said

from cache.types import ExpertKey, Phase


def test_frequency_is_the_faded_share_of_a_layers_tokens() -> None:
    frequency = make("frequency(rate=0.5)")
    for seen in passes(((0, 1), (4, 5), (6, 7)), ((0, 2), (4, 5), (6, 7)), ((0, 1), (4, 5), (6, 7))):
        frequency.observe(seen)
    # Of layer 0, three tokens: worth 1/4 + 1/2 + 1, and one that went nowhere.
    assert said(frequency) == {
        ExpertKey(0, 0): 1.75 / 2.75,
        ExpertKey(0, 1): 1.25 / 2.75,
        ExpertKey(0, 2): 0.5 / 2.75,
    }
    assert [(p.key, p.lead_layers) for p in frequency.predict(2)][3:] == [(ExpertKey(1, 4), 2), (ExpertKey(1, 5), 2)]


def test_a_pass_of_many_tokens_needs_an_expert_unless_none_of_them_does() -> None:
    frequency = make("frequency(rate=0.5)")
    for seen in passes(((0, 1), (4, 5), (6, 7))):
        frequency.observe(seen)
    prompt = event(0, (0, 1, 2), step=1, phase=Phase.PREFILL, tokens=(2, 1, 1))  # two tokens of two experts each
    frequency.observe(prompt)
    assert said(frequency) == {ExpertKey(1, 4): 0.75, ExpertKey(1, 5): 0.75}  # 1 - (1 - 1/2)^2
    frequency.observe(prompt._replace(layer=1, experts=(4, 5), tokens=(2, 2)))
    frequency.observe(prompt._replace(layer=2, experts=(6, 7), tokens=(2, 2)))
    # The next pass decodes. Layer 0 saw one token, worth 1/4 now, and two worth (1 + 1/2) / 2 each.
    assert said(frequency)[ExpertKey(0, 0)] == (0.25 + 1.5) / (0.25 + 1.5 + 1)
