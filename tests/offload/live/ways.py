"""The ways to use a model that transformers' guides show: each a function that does so, and returns what came out.

Pipelines, chats, caches that are kept, assisted decoding, perplexity, and code of the user's own within `generate`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from threading import Thread
from typing import Any, NamedTuple

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)

from scripts.fuzz.tokenizer import tiny_tokenizer

TEXT = "The lighthouse keeper counted the ships that passed, and wrote their names into a book with a green cover."
CHAT = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "Name a ship that passed."}]
SHORT = {"max_new_tokens": 12, "do_sample": False}


class Setup(NamedTuple):
    """What an example is given; `assistant` and `stranger` are small models, with this tokenizer and with another."""

    model: Any
    tokenizer: Any
    assistant: Any
    stranger: Any


Example = Callable[[Setup], Any]
EXAMPLES: list[Example] = []


def example(function: Example) -> Example:
    """Run it, and compare what it returns."""
    EXAMPLES.append(function)
    return function


def inputs(given: Setup, text: Any = TEXT, **kwargs: Any) -> Any:
    return given.tokenizer(text, return_tensors="pt", **kwargs).to(given.model.device)


def chat_inputs(given: Setup, chat: list[dict[str, str]]) -> Any:
    template = given.tokenizer.apply_chat_template
    return template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)


# Pipelines.


@example
def pipeline_with_a_text(given: Setup) -> Any:
    return pipeline("text-generation", model=given.model, tokenizer=given.tokenizer)(TEXT, max_new_tokens=20)


@example
def pipeline_with_texts_in_batches(given: Setup) -> Any:
    generator = pipeline(task="text-generation", model=given.model, tokenizer=given.tokenizer, batch_size=2)
    return generator([TEXT, TEXT[:30], "A book"], **SHORT)


@example
def pipeline_over_an_iterator(given: Setup) -> Any:
    generator = pipeline("text-generation", model=given.model, tokenizer=given.tokenizer)
    return list(generator((f"Ship {i}" for i in range(3)), **SHORT))


@example
def pipeline_with_several_answers(given: Setup) -> Any:
    generator = pipeline("text-generation", model=given.model, tokenizer=given.tokenizer)
    return generator(TEXT, num_return_sequences=3, return_full_text=False, max_new_tokens=8)


@example
def pipeline_with_token_ids_and_a_stop(given: Setup) -> Any:
    generator = pipeline("text-generation", model=given.model, tokenizer=given.tokenizer)
    said = given.tokenizer.decode(given.model.generate(**inputs(given), **SHORT)[0, -6:])
    stopped = generator(TEXT, stop_sequence=said[:2], return_full_text=False, **SHORT)
    return stopped, generator(TEXT, return_tensors=True, **SHORT)


@example
def pipeline_that_goes_on_with_a_chat(given: Setup) -> Any:
    generator = pipeline("text-generation", model=given.model, tokenizer=given.tokenizer)
    chat = generator(CHAT, max_new_tokens=10)[0]["generated_text"]
    return generator([*chat, {"role": "user", "content": "And another?"}], max_new_tokens=10)


@example
def pipeline_with_an_assistant(given: Setup) -> Any:
    generator = pipeline(
        "text-generation", model=given.model, tokenizer=given.tokenizer, assistant_model=given.assistant
    )
    return generator(TEXT, **SHORT)


# Chats.


@example
def chat_step_by_step(given: Setup) -> Any:
    text = given.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    tokens = {key: value.to(given.model.device) for key, value in inputs(given, text).items()}
    said = given.model.generate(**tokens, max_new_tokens=16)
    return given.tokenizer.decode(said[0][tokens["input_ids"].size(1) :], skip_special_tokens=True)


@example
def chat_that_is_streamed(given: Setup) -> Any:
    streamer = TextIteratorStreamer(given.tokenizer, skip_prompt=True, skip_special_tokens=True)
    arguments = {**chat_inputs(given, CHAT), **SHORT, "streamer": streamer}
    thread = Thread(target=given.model.generate, kwargs=arguments)
    thread.start()
    pieces = list(streamer)
    thread.join()
    return pieces


@example
def chat_that_keeps_its_cache(given: Setup) -> Any:
    cache, chat = DynamicCache(config=given.model.config), [CHAT[0]]
    for question in ("Name a ship.", "And another?"):
        chat.append({"role": "user", "content": question})
        tokens = chat_inputs(given, chat)
        said = given.model.generate(**tokens, past_key_values=cache, **SHORT)
        answer = given.tokenizer.decode(said[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        chat.append({"role": "assistant", "content": answer})
    return chat, cache.get_seq_length()


# Caches.


@example
def own_loop_with_a_cache(given: Setup) -> Any:
    tokens, cache = inputs(given), DynamicCache(config=given.model.config)
    ids, mask, said = tokens.input_ids, tokens.attention_mask, []
    for _ in range(6):
        output = given.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        ids = output.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, mask.new_ones((mask.shape[0], 1))], dim=-1)
        said += [output.logits[:, -1], ids]
    return said


@example
def static_cache(given: Setup) -> Any:
    return given.model.generate(**inputs(given), cache_implementation="static", **SHORT)


@example
def no_cache(given: Setup) -> Any:
    return given.model.generate(**inputs(given), use_cache=False, **SHORT)


@example
def prefix_that_is_read_once(given: Setup) -> Any:
    kept = []
    for cache in (DynamicCache(config=given.model.config), StaticCache(config=given.model.config, max_cache_len=80)):
        with torch.no_grad():
            prefix = given.model(**inputs(given), past_key_values=cache).past_key_values
        for more in (" Then it rained.", " Nobody came."):
            reused = copy.deepcopy(prefix)
            kept.append(given.model.generate(**inputs(given, TEXT + more), past_key_values=reused, **SHORT))
    return kept


# Assisted decoding.


@example
def an_assistant_that_samples(given: Setup) -> Any:
    return given.model.generate(
        **inputs(given), assistant_model=given.assistant, do_sample=True, temperature=0.5, max_new_tokens=12
    )


@example
def an_assistant_with_another_tokenizer(given: Setup) -> Any:
    other = tiny_tokenizer()
    return given.model.generate(
        **inputs(given), assistant_model=given.stranger, tokenizer=given.tokenizer, assistant_tokenizer=other, **SHORT
    )


@example
def the_assistant_itself(given: Setup) -> Any:
    return given.assistant.generate(**inputs(given), assistant_model=given.model, **SHORT)


@example
def its_first_layers_as_the_assistant(given: Setup) -> Any:
    return given.model.generate(**inputs(given), assistant_early_exit=1, **SHORT)


@example
def prompt_lookup(given: Setup) -> Any:
    return given.model.generate(**inputs(given, TEXT + TEXT), prompt_lookup_num_tokens=4, **SHORT)


# Perplexity.


@example
def perplexity_in_windows(given: Setup) -> Any:
    ids = inputs(given, TEXT * 6).input_ids
    losses, end = [], 0
    for begin in range(0, ids.size(1), 32):
        before, end = end, min(begin + 64, ids.size(1))
        window = ids[:, begin:end]
        labels = window.clone()
        labels[:, : before - end] = -100
        with torch.no_grad():
            losses.append(given.model(window, labels=labels).loss)
        if end == ids.size(1):
            break
    return losses, torch.exp(torch.stack(losses).mean())


# Code of the user's own.


class Until(StoppingCriteria):  # type: ignore[misc]
    """Stops a sequence that has a token twice in a row, or is long."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return (input_ids[:, -1] == input_ids[:, -2]) | (input_ids.shape[1] > 40)


class Even(LogitsProcessor):  # type: ignore[misc]
    """Allows even ids alone."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, 1::2] = -torch.inf
        return scores


@example
def criteria_and_processors(given: Setup) -> Any:
    criteria = StoppingCriteriaList([Until()])
    both = inputs(given, [TEXT, "A book"], padding=True, padding_side="left")
    return given.model.generate(**both, stopping_criteria=criteria, logits_processor=[Even()], **SHORT)


@example
def allowed_tokens(given: Setup) -> Any:
    allowed = given.tokenizer(TEXT).input_ids
    return given.model.generate(
        **inputs(given), num_beams=2, prefix_allowed_tokens_fn=lambda batch, ids: allowed, **SHORT
    )


@example
def a_loop_within_generate(given: Setup) -> Any:
    def greedy(model: Any, input_ids: torch.Tensor, stopping_criteria: Any, **kwargs: Any) -> torch.Tensor:
        while input_ids.shape[1] < stopping_criteria[0].max_length:
            chosen = model(input_ids).logits[:, -1:].argmax(-1)
            input_ids = torch.cat((input_ids, chosen), dim=-1)
        return input_ids

    return given.model.generate(**inputs(given), custom_generate=greedy, max_new_tokens=6)


@example
def everything_that_generate_can_return(given: Setup) -> Any:
    said = given.model.generate(
        **inputs(given), return_dict_in_generate=True, output_scores=True, output_logits=True, **SHORT
    )
    scores = given.model.compute_transition_scores(said.sequences, said.scores, normalize_logits=True)
    return said[:3], scores, sorted(said)


@example
def generation_config_of_its_own(given: Setup) -> Any:
    config = GenerationConfig(max_new_tokens=9, num_beams=3, eos_token_id=given.model.config.eos_token_id)
    with torch.inference_mode():
        return given.model.generate(**inputs(given), generation_config=config)
