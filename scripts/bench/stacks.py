"""Where a sampled program's time goes: stacks that py-spy wrote, each counted to one part of reading a prompt."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

OTHERS = "others"
WAITING = "waiting for experts"
MAIN = "MainThread"

_FRAME = re.compile(r"(?P<function>.*) \((?P<file>[^()]*?)(?::(?P<line>\d+))?\)$")
_NO_NAME = re.compile(r"0x|GOMP_|std::|c10::function_ref|at::internal|at::TensorIterator|dnnl::impl::parallel|Py|_Py")
"""Native functions that are no one's own work: they say what is called, not what is done."""
_PACKAGES = re.compile(r".*/(?:site|dist)-packages/")


class Frame(NamedTuple):
    """A function of Python, or of a compiled library."""

    function: str
    file: str
    line: str

    @property
    def is_python(self) -> bool:
        return self.file.endswith(".py")

    def __str__(self) -> str:
        if not self.is_python:
            return re.split(r"[(<\[]", self.function.replace("(anonymous namespace)::", ""), maxsplit=1)[0]
        return f"{self.function} ({'/'.join(_PACKAGES.sub('', self.file).split('/')[-3:])}:{self.line})"


class Rule(NamedTuple):
    """A part of the work, by a function and its file."""

    part: str
    function: str
    file: str

    def has(self, frame: Frame) -> bool:
        """Is this a frame of that part?"""
        return bool(re.search(self.function, frame.function) and re.search(self.file, frame.file))


RULES = (
    Rule(WAITING, r"^(Condition|Event)\.wait|^(SimpleQueue|Queue)\.get", r"/(threading|queue)\.py$"),
    Rule("packing and unpacking", r"(^|_)(un)?pack(_|$)|quantize|decode", r"/formats/|bitsandbytes|_kernels"),
    Rule("reading", "read", r"/offload/store/|/offload/engine/disk\.py$"),
    Rule("reading", r"^DiskEmbedding", ""),
    Rule("attention", r"attention_forward|^(Dynamic|Sliding)\w*\.update", r"/transformers/"),
    Rule("norms and rotary embeddings", r"Norm\.forward|rotary|rotate_half|RotaryEmbedding\.forward", ""),
    Rule("router", r"(Router|Gate)\.forward|route_tokens", r"/transformers/"),
    Rule("router", "", r"/offload/layers/(router|lookahead|calibration)\.py$"),
    Rule("dense linear layers", r"", r"/offload/layers/(linear|rows)\.py$"),
    Rule("dense linear layers", r"^Linear\.forward", ""),
    Rule("experts' gates", r"apply_gate|act_fn", r"/transformers/"),
    Rule("experts' products", "", r"/formats/cpu/nf4_experts\.py$"),
    Rule(
        "experts' products",
        r"^(compute_expert|_products|_products_each|_linear|_linear_each)$",
        r"/engine/outputs\.py$",
    ),
    Rule("experts' rows, gathered and summed", "", r"/engine/(hook|outputs)\.py$"),
    Rule("attention", r"Attention\.forward", r"/transformers/"),
    Rule(OTHERS, "", r"/transformers/models/"),
    Rule("engine", "", r"/offload/(engine|assembly|decide|model)\b|/(cache|predictors)/\w+(/\w+)?\.py$"),
)
"""The innermost frame that any of them has says what a sample is counted to."""
PARTS = (*(part for part in dict.fromkeys(rule.part for rule in RULES) if part != OTHERS), OTHERS)


@dataclass
class Profile:
    """Samples of the thread that reads the prompt, and of the others beside it while they do not wait.

    `functions` has, of each sample of the first, the innermost Python function and the innermost named native one.
    """

    parts: Counter[str] = field(default_factory=Counter)
    beside: Counter[str] = field(default_factory=Counter)
    functions: Counter[str] = field(default_factory=Counter)
    part_of: dict[str, str] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Of the thread that reads the prompt."""
        return self.parts.total()


def profile(lines: Iterable[str], within: str) -> Profile:
    """Sum up stacks in py-spy's raw format; of the main thread those alone that have a function `within`."""
    found = Profile()
    for thread, frames, count in _stacks(lines):
        part = part_of(frames)
        if thread != MAIN:
            if part != WAITING:
                found.beside[part] += count
        elif any(frame.function == within for frame in frames):
            name = innermost(frames)
            found.parts[part] += count
            found.functions[name] += count
            found.part_of.setdefault(name, part)
    return found


def part_of(frames: Sequence[Frame]) -> str:
    """What a stack, outermost first, is counted to."""
    for frame in reversed(frames):
        for rule in RULES:
            if rule.has(frame):
                return rule.part
    return OTHERS


def innermost(frames: Sequence[Frame]) -> str:
    """Its innermost Python function, and what runs of a library below it."""
    native = ""
    for frame in reversed(frames):
        if frame.is_python:
            return f"{frame} > {native}" if native else str(frame)
        if not native and "/include/" not in frame.file and not _NO_NAME.match(str(frame)):
            native = str(frame)
    return native or "?"


def _stacks(lines: Iterable[str]) -> Iterator[tuple[str, list[Frame], int]]:
    for line in lines:
        stack, _, count = line.rstrip().rpartition(" ")
        thread, *frames = stack.split(";")
        yield thread.rpartition(": ")[2], [_frame(text) for text in frames], int(count)


def _frame(text: str) -> Frame:
    match = _FRAME.match(text)
    return Frame(match["function"], match["file"], match["line"] or "") if match else Frame(text, "", "")
