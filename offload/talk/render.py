"""Renders chat templates, as a program of its own: whatever a template does can neither hang nor fill its caller.

It runs as a file, with the caller's module path as arguments. A task comes as JSON on standard input, and standard
output has what each conversation became: {"text": ...}, or {"error": ..., "refused": ...}. Processor time and memory
are limited by the operating system, so loops in loops, powers and strings of strings all come to an end. jinja2 is all
that it imports. The environment is the one that transformers renders chat templates in; a test compares both.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any


def main() -> None:
    """Renders the task on standard input within its limits."""
    task = json.loads(sys.stdin.buffer.read())
    _limit(task["seconds"], task["bytes"])
    found = render(task["template"], task["conversations"], task["variables"], task["characters"])
    json.dump(found, sys.stdout)


def render(
    template: str, conversations: Sequence[Any], variables: Mapping[str, Any], characters: int
) -> list[dict[str, Any]]:
    """What each conversation becomes, at most `characters` long; "refused" is an error that the template raised."""
    try:
        compiled = _environment().from_string(template)
    except Exception as error:
        return [_failure(error) for _ in conversations]
    found = []
    for messages in conversations:
        try:
            text = compiled.render(messages=messages, **variables)
            if len(text) > characters:
                raise OverflowError(f"it makes {len(text)} characters of it")
            found.append({"text": text})
        except Exception as error:  # a template is a program, and fails as programs do
            found.append(_failure(error))
    return found


def _failure(error: Exception) -> dict[str, Any]:
    from jinja2 import TemplateError

    if isinstance(error, MemoryError):
        return {"error": "it wants more memory than it may have", "refused": False}
    said, kind = str(error), type(error).__name__
    refused = isinstance(error, TemplateError)
    return {"error": said if refused and said else f"{kind}: {said}", "refused": refused}


def _limit(seconds: int, nbytes: int) -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    for kind, limit in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, nbytes), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _environment() -> Any:
    """As transformers': sandboxed, with `generation` blocks, `break` and `continue`, and a filter of its own."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation(), loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _names(),
    }
    return environment


def _generation() -> Any:
    """A block that says which text is a reply. Rendering shows what is in it."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012, as jinja2 has it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    return Generation


def _names() -> Any:
    """A namespace that keeps Python's own names out of reach."""
    from jinja2.sandbox import SecurityError
    from jinja2.utils import Namespace

    def check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace may not have a {name!r}")

    class Names(Namespace):
        def __init__(*arguments: Any, **names: Any) -> None:
            itself, *rest = arguments
            given = dict(*rest, **names)
            for name in given:
                check(name)
            Namespace.__init__(itself, given)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            super().__setitem__(name, value)

    return Names


class _Dict:
    """`dict`, without what else Python's own class gives away."""

    def __call__(self, *arguments: Any, **names: Any) -> dict[Any, Any]:
        return dict(*arguments, **names)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


def _refuse(message: Any) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


if __name__ == "__main__":
    sys.path[:] = sys.argv[1:]
    main()
