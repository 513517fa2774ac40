"""Chat templates made wrong: those that fail, that never end or never stop growing, and letters changed at random."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

from scripts.fuzz.tokenizer import TEMPLATE

BAD: Sequence[str] = (
    "",
    "{{ 1 / 0 }}",
    "{{ messages + 1 }}",
    "{{ raise_exception('no system prompts') }}",
    "{{ messages[0]['content'] * 10**9 }}",
    "{{ 'x' * 10**12 }}",
    "{{ 10 ** 10 ** 7 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = b %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for a in range(10**12) %}x{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% include 'x' %}",
    "{% extends 'x' %}",
    "{% import 'x' as x %}",
    "{{ messages",
    "{% if %}",
    "{{ nothing.at.all }}",
    "{{ messages[7].content }}",
    "{{ messages | tojson }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ bos_token }}{{ messages[0].content.nope() }}",
    "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}<|im_start|>",
    "{% for m in messages %}{% if m.content is not string %}{{ m.content[0].text }}{% endif %}{% endfor %}",
    "{% generation %}x{% endgeneration %}",
    "{{ strftime_now('%Y') }}",
    "{{ '%s' % messages }}{{ '%999999999d' % 1 }}",
    "{{ messages[0]['content'].ljust(10**10) }}",
    "{{ '\x1b[2J' }}{{ messages[0].content }}",
    "{{ messages[0].content | replace('', messages[0].content * 1000) | replace('', 'x' * 100000) }}",
    "{% set ns = namespace(x='xx') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "\ud800",
    TEMPLATE + "{{ tools.x.y }}",
    TEMPLATE + "<think>\n",
    TEMPLATE + "<|channel|>analysis<|message|>",
)
_LETTERS = "{}%'\"|[]().+-*/ \nx0é"


def mutate_template(random: Random, folder: Path) -> str:
    """Puts a bad chat template in a checkpoint, in a file or in the tokenizer's configuration; says which."""
    text = random.choice(BAD) if random.random() < 0.6 else _changed(random)
    own, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if random.random() < 0.5 or not config.is_file():
        own.write_text(text, encoding="utf-8", errors="surrogatepass")
    else:
        own.unlink(missing_ok=True)
        found = json.loads(config.read_text())
        named = [{"name": random.choice(["default", "tool_use", "rag"]), "template": text} for _ in range(2)]
        found["chat_template"] = named if random.random() < 0.3 else text
        config.write_text(json.dumps(found))
    return f"chat template {ascii(text)[:90]}"


def _changed(random: Random) -> str:
    letters = list(TEMPLATE)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(letters))
        letters[at] = random.choice(["", letters[at] * 2, random.choice(_LETTERS)])
    return "".join(letters)
