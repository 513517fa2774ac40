"""What the plain transformers model answers to the same input, with everything in memory."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging

from offload.checkpoint.config.generation import NUMBERS, read_generation_config
from offload.checkpoint.config.tokenizer import load_tokenizer
from offload.talk.settings import settled
from offload.terminal.flags import readable
from scripts.fuzz.case import Case
from scripts.fuzz.weights import INDEX

Ids = list[int]
_SETTINGS = "generation_config.json"


class Refused(Exception):
    """transformers does not load this checkpoint whole, or does not answer."""


def answers(case: Case, said: dict[str, Any], mended: bool) -> list[Ids]:
    """The new tokens that would be right for what `offload --json` `said`: those that transformers gives.

    As many as were made; more than that where the reply ended by itself, so that it must end here, too. More than one
    answer where a prompt may be rendered in more than one way. With `mended`, generation_config.json is read as ours,
    which had to say what it took otherwise. Raises Refused.
    """
    made = len(said["token_ids"])
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        try:
            config = None
            if mended:
                config = read_generation_config(case.folder)
                (case.folder / _SETTINGS).unlink()
            else:
                _rewrite_settings(case.folder / _SETTINGS)
            model = _load(case.original if case.renamed else case.folder)
            if config is not None:
                model.generation_config, model.tokenizer = config, load_tokenizer(case.folder)
            told = {} if config is None else settled(model)
            count = made if said["finish"] == "length" else _limit(model, case, made)
            return [_generate(model, case, ids, count, told) for ids in _prompts(case)]
        except Exception as error:
            raise Refused(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers logs no more than errors."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _rewrite_settings(path: Path) -> None:
    """The same settings as transformers wants them: without a byte order mark, which makes it pass the file over in
    silence, and 2 as 2.0 where it refuses whole numbers."""
    try:
        settings = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(settings, dict):
        whole = {name: value for name, value in settings.items() if type(value) is int and name in NUMBERS}
        path.write_text(json.dumps(settings | {name: float(value) for name, value in whole.items()}), "utf-8")


def _load(folder: Path) -> Any:
    """The whole model. An index that is not needed, as every shard is there, may be missing or say nonsense."""
    try:
        return _load_with_index(folder)
    except Refused:
        raise
    except Exception:
        if not _write_index(folder):
            raise
        return _load_with_index(folder)


def _write_index(folder: Path) -> bool:
    """Writes the index that the shards should have; whether there was another one, or none."""
    weight_map: dict[str, str] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            weight_map |= dict.fromkeys(tensors.keys(), shard.name)
    path, right = folder / INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    if path.is_dir():
        path.rmdir()
    if path.is_file() and path.read_bytes() == right:
        return False
    path.unlink(missing_ok=True)
    path.write_bytes(right)
    return True


def _load_with_index(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", experts_implementation="grouped_mm", output_loading_info=True
    )
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info[what]:
            raise Refused(f"{what}: {sorted(map(str, info[what]))[0]}")
    return model.eval()


def _prompts(case: Case) -> Sequence[Ids]:
    given = _option(case, "--prompt-ids")
    if given is not None:
        return [[int(part) for part in given.split(",")]]
    text = readable(_option(case, "--prompt")) or ""
    tokenizer = AutoTokenizer.from_pretrained(case.folder)
    if case.command.name == "generate":
        return [tokenizer(text)["input_ids"]]
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        tokenizer.chat_template = next(iter(tokenizer.chat_template.values()))  # as ours says that it does
    text, system = text.strip(), readable(_option(case, "--system")) or ""
    forms: list[Callable[[str], Any]] = [lambda said: said, lambda said: [{"type": "text", "text": said}]]
    rendered = []
    for form in forms:
        try:
            messages = [{"role": "user", "content": form(text)}]
            if system:
                messages.insert(0, {"role": "system", "content": form(system)})
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception:  # a template takes one of the two, or both
            continue
        if ids:
            rendered.append(ids)
    if not rendered:
        raise Refused("the chat template refuses")
    return rendered


def _generate(model: Any, case: Case, prompt: Ids, count: int, told: dict[str, Any]) -> Ids:
    sampling = dict(told)
    temperature, top_p = _option(case, "--temperature"), _option(case, "--top-p")
    if temperature is not None:
        hot = float(temperature) > 0
        sampling |= {"do_sample": True, "temperature": float(temperature)} if hot else {"do_sample": False}
    if top_p is not None:
        sampling |= {"do_sample": True, "top_p": float(top_p)}
    set_seed(int(_option(case, "--seed") or 0))
    ids = torch.tensor([prompt])
    if model.generation_config.stop_strings:
        sampling["tokenizer"] = load_tokenizer(case.folder)
    made: Any = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **sampling)
    return list(getattr(made, "sequences", made)[0][len(prompt) :].tolist())


def _limit(model: Any, case: Case, made: int) -> int:
    """How many tokens a reply may have that ended by itself after `made`: some rules go by the limit."""
    asked = _option(case, "--max-new-tokens") or model.generation_config.max_new_tokens
    return min(int(asked), made + 300) if asked else made + 8


def _option(case: Case, flag: str) -> str | None:
    words = list(case.command.words)
    return words[words.index(flag) + 1] if flag in words else None
