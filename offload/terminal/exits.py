"""The exit codes of the program, 0 aside."""

from __future__ import annotations

UNEXPECTED = 1
MISTAKE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
BROKEN_PIPE = 141  # 128 + SIGPIPE
