"""Figures for reports, drawn with matplotlib where it is installed: an optional dependency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache.errors import OffloadError


def new_figure(width: int = 1) -> Any:
    """An empty figure with room for `width` plots side by side. Raises OffloadError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OffloadError("--plot needs matplotlib: run `pip install matplotlib`") from error
    return Figure(figsize=(6 * width, 4.5), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write `figure` to `path`. Raises OffloadError for a name that ends in no format that is known, and OSError."""
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise OffloadError(f"--plot {path}: {error}") from error
