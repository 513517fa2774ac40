"""Numbers on the command line that nothing can be done with are refused in one line, by the flag."""

from __future__ import annotations

import pytest
from command_line import run

HUGE = 10**30


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "M", "--prompt-tokens", HUGE),
        ("bench", "M", "--repeat", HUGE),
        ("tune", "M", "--repeat", HUGE),
        ("predict", "T", "--depth", HUGE),
        ("train-predictor", "T", "-o", "F", "--depth", HUGE),
        ("train-predictor", "T", "-o", "F", "--window", HUGE),
        ("train-predictor", "T", "-o", "F", "--hold-out", HUGE),
        ("calibrate", "M", "--prompts", "P", "--depth", HUGE),
        ("trace", "record", "M", "--prompts", "P", "-o", "T", "--predicted", HUGE),
        ("generate", "M", "--prompt-ids", "1", "--seed", HUGE),
        ("generate", "M", "--prompt-ids", "1", "--temperature", "nan"),
        ("generate", "M", "--prompt-ids", "1", "--temperature", "inf"),
        ("generate", "M", "--prompt-ids", "1", "--temperature", "1e-40"),
        ("chat", "M", "--prompt", "x", "--top-p", "0"),
        ("chat", "M", "--prompt", "x", "--top-p", "nan"),
    ],
)
def test_what_nothing_can_be_done_with_is_refused(
    arguments: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = run(capsys, *arguments, code=2)
    assert out == "" and err.startswith("offload: error: ") and err.count("\n") == 1
    assert str(arguments[-2]) in err
