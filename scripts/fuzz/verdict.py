"""What became of an input, and whether that may be: the plain model's answer, or one line and exit code 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["answered", "planned", "refused", "traceback", "hang", "crash", "wrong"]
GOOD: Sequence[Kind] = ("answered", "planned", "refused")


@dataclass(frozen=True)
class Verdict:
    """One input's outcome; `line` is what was said, or what is wrong."""

    kind: Kind
    line: str = ""

    @property
    def good(self) -> bool:
        """Whether this may be."""
        return self.kind in GOOD


def judge_refusal(code: object, err: str) -> Verdict:
    """Of a run that ended with an exit code other than 0."""
    errors = [line for line in err.splitlines() if line.startswith("offload: error: ")]
    others = [line for line in err.splitlines() if not line.startswith("offload: ")]
    if "Traceback" in err:
        return Verdict("traceback", err[-1500:])
    if code != 2:
        return Verdict("traceback", f"exit code {code}: {err[-1500:]}")
    if len(errors) != 1 or others:
        return Verdict("wrong", f"not one line: {err[-1500:]!r}")
    if any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in errors[0]):
        return Verdict("wrong", f"control characters: {errors[0]!r}")
    if len(errors[0]) > 2000:
        return Verdict("wrong", f"a line of {len(errors[0])} characters: {errors[0][:200]!r}")
    return Verdict("refused", errors[0])
