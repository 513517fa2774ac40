"""Progress of a conversion, on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from offload.system.sizes import format_bytes


class ConversionBar:
    """What `convert` calls as it goes."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._task: Any = None

    def start(self, total: int, done: int) -> None:
        """So many bytes of records are to be written, of which so many are there."""
        if self._bars is not None:
            self._task = self._bars.add_task(f"converting experts to {format_bytes(total)}", total=total)
            self._bars.update(self._task, completed=done)

    def advance(self, nbytes: int) -> None:
        """A record was written."""
        if self._bars is not None:
            self._bars.advance(self._task, nbytes)

    def wait(self) -> None:
        """Another process converts the same model."""
        if self._bars is not None:
            self._bars.console.print("offload: waiting for another process that converts these experts")


@contextmanager
def conversion_bar(show: bool) -> Iterator[ConversionBar]:
    """A bar while the block runs, if `show`."""
    if not show:
        yield ConversionBar(None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield ConversionBar(bars)
