"""The tests run as well in the background, where a shell makes them ignore Ctrl-C, as in the foreground."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest


def test_ctrl_c_is_heard() -> None:
    program = "import signal, sys; sys.exit(signal.getsignal(signal.SIGINT) is not signal.default_int_handler)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.skipif(os.name != "posix", reason="only POSIX shells make what they start ignore Ctrl-C")
def test_ctrl_c_is_heard_in_the_background() -> None:
    background = (
        "import signal, sys, pytest; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.exit(pytest.main(sys.argv[1:]))"
    )
    test = f"{__file__}::{test_ctrl_c_is_heard.__name__}"
    result = subprocess.run([sys.executable, "-c", background, test], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert "1 passed" in result.stdout
