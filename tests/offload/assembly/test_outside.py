"""Importing, loading, running and closing a model changes nothing for others but what docs/architecture.md says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import outside
import tiny
from tiny_chat import environment

from offload.system.cores import at_most_cores


def test_what_changes_outside_the_model(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_moe")
    command = [sys.executable, outside.__file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    stages: dict[str, object] = {}
    for line in done.stdout.splitlines():
        stages |= json.loads(line)
    threads = str(at_most_cores(2))
    assert stages == {
        "import": {"causal models": ["offload"], "experts functions": ["offload", "offload-shapes"]},
        "load": {"torch's threads": ["1", threads]} if threads != "1" else {},
        "generate": {},
        "close": {"torch's threads": [threads, "1"]} if threads != "1" else {},
    }
