"""Build llama.cpp for one processor level: llama-cpp-python from its source, in a virtual environment of its own.

    python scripts/peers/build_llama.py avx2 /venvs/llama-avx2
    python scripts/peers/build_llama.py native /venvs/llama-native

Needs a C++ compiler and pip's index; takes an hour or less on two cores. `peers/bench.py --llama-python` takes several.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from scripts.peers.levels import LEVELS, NATIVE, cmake_arguments

VERSION = "0.3.36"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("level", choices=[*LEVELS, NATIVE])
    parser.add_argument("folder", type=Path, help="the new virtual environment")
    parser.add_argument("--version", default=VERSION, help="of llama-cpp-python (default %(default)s)")
    parser.add_argument("--jobs", default="1", help="compilers at a time (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands alone")
    args = parser.parse_args(argv)
    flags = {"CMAKE_ARGS": " ".join(cmake_arguments(args.level)), "CMAKE_BUILD_PARALLEL_LEVEL": args.jobs}
    pip = [str(args.folder / "bin" / "python"), "-m", "pip", "install"]
    # What pip compiled for another level is in its cache: without it.
    source = ["--no-cache-dir", "--no-binary", "llama-cpp-python", f"llama-cpp-python=={args.version}"]
    for command in ([sys.executable, "-m", "venv", str(args.folder)], [*pip, "numpy", "gguf"], [*pip, *source]):
        print(*(f"{name}='{value}'" for name, value in flags.items()), *command, flush=True)
        if not args.dry_run and (code := subprocess.run(command, env=os.environ | flags).returncode):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
