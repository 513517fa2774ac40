"""The one progress bar: on standard error, while something takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from offload.system.text import printable

Unit = Literal["bytes", "items"]


class Bar:
    """What to tell while it goes on; does nothing where nothing is shown."""

    def __init__(self, bars: Any = None, task: Any = None) -> None:
        self._bars = bars
        self._task = task

    def advance(self, count: int = 1) -> None:
        """So many more items, or bytes, are done."""
        if self._bars is not None:
            self._bars.advance(self._task, count)

    def update(self, *, title: str | None = None, total: int | None = None, done: int | None = None) -> None:
        """What is done now, of how many in all, and what it is called; None leaves that as it is."""
        if self._bars is not None:
            shown = True if total is not None else None
            title = None if title is None else printable(title)
            self._bars.update(self._task, description=title, total=total, completed=done, visible=shown)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._bars is not None:
            self._bars.console.print(printable(line))


@contextmanager
def progress_bar(
    title: str,
    total: int | None = None,
    *,
    unit: Unit = "items",
    done: int = 0,
    show: bool | None = None,
    keep: bool = False,
) -> Iterator[Bar]:
    """A bar over `total` items, or bytes, of which `done` are there.

    Without a `total` it appears once `update` says it. `show` None means: where standard error is a terminal. `keep`
    leaves it there when it is done.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield Bar()
        return
    from rich import progress
    from rich.console import Console

    counted = (
        (progress.DownloadColumn(binary_units=True), progress.TransferSpeedColumn())
        if unit == "bytes"
        else (progress.MofNCompleteColumn(),)
    )
    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        *counted,
        progress.TimeRemainingColumn(),
    )
    console = Console(stderr=True, highlight=False, markup=False)
    with progress.Progress(*columns, console=console, transient=not keep) as bars:
        yield Bar(bars, bars.add_task(printable(title), total=total, completed=done, visible=total is not None))
