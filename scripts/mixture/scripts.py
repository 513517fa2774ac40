"""Stands for the package `scripts` where a file beside this one is run by its path, and Python looks here first."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[1])]
