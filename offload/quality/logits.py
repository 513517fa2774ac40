"""Logits of long passes: computed a few rows at a time, and kept on disk to be compared with.

All logits of a long pass at once may need more memory than the pass: 600 KiB a token in float32 where there are 150,000
words. The file is read and written, not mapped: mapped pages count as this process's memory, which has a budget.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from cache.errors import DiskSpaceError
from offload.system.sizes import format_bytes

BLOCK = 2**20
"""Numbers in one block of logits: 8 MiB in float64."""


def pass_logits(model: Any, ids: torch.Tensor, cache: Any) -> tuple[Iterator[torch.Tensor], Any]:
    """One forward pass of an OffloadedModel over `ids` [B, T], after what `cache` holds (None: nothing).

    Gives the logits of its tokens as blocks [B, some of T, V] in order, in the model's dtype and on the CPU, made when
    they are asked for, and the cache, which has grown.
    """
    inner = model.module
    base = inner.base_model
    caught: list[Any] = []
    hook = base.register_forward_hook(lambda module, args, output: caught.append(output))
    try:
        output = model.forward(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    finally:
        hook.remove()

    def blocks() -> Iterator[torch.Tensor]:
        rows = max(BLOCK // (output.logits.shape[-1] * len(ids)), 1)
        if output.logits.shape[1] == ids.shape[1]:  # one token, or a model that always gives all
            yield from (logits.to("cpu", model.dtype) for logits in output.logits.split(rows, 1))
            return
        head: Any = _Head(inner, base, caught[0])
        for kept in torch.arange(ids.shape[1], device=ids.device).split(rows):
            with torch.no_grad():
                logits = type(inner).forward(head, input_ids=ids, use_cache=False, logits_to_keep=kept).logits
            yield logits.to("cpu", model.dtype)

    return blocks(), output.past_key_values


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """KL(p || q) in nats of logarithms of probabilities [M, V], summed over rows."""
    # A word that p excludes has logarithm -inf and adds nothing.
    return float(torch.where(p == -math.inf, 0, p.exp() * (p - q)).sum())


class _Head:
    """A causal language model whose base has already run: its own forward makes the logits of the rows asked for,
    with whatever it does to them."""

    def __init__(self, model: Any, base: Any, output: Any) -> None:
        self._model, self._base, self._output = model, base, output

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._model, name)
        return self._answer if value is self._base else value

    def _answer(self, *args: Any, **kwargs: Any) -> Any:
        return self._output


class LogitFile:
    """Rows of logits [V] in a file without a name: it is gone when it is closed, or when the process ends, however.

    Rows are appended in order and read in any. Raises DiskSpaceError when `folder` has no room for all `rows`.
    """

    def __init__(self, folder: Path, rows: int, width: int, dtype: torch.dtype) -> None:
        self._row_bytes, self._dtype = width * dtype.itemsize, dtype
        folder.mkdir(parents=True, exist_ok=True)
        needed, free = rows * self._row_bytes, shutil.disk_usage(folder).free
        if needed > free:
            raise DiskSpaceError(
                f"the reference's logits of {rows} tokens take {format_bytes(needed)} under {folder}, where "
                f"{format_bytes(free)} are free: lower --tokens, free some or set OFFLOAD_CACHE to another disk"
            )
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__

    def append(self, rows: torch.Tensor) -> None:
        """Keep `rows` [M, V]."""
        self._file.write(rows.contiguous().view(torch.uint8).numpy().data)

    def read(self, start: int, count: int) -> torch.Tensor:
        """`count` rows from row `start` on: [count, V]."""
        found = torch.empty(count * self._row_bytes, dtype=torch.uint8)
        self._file.seek(start * self._row_bytes)
        read = self._file.readinto(found.numpy().data)
        if read != found.numel():
            raise ValueError(f"rows {start} to {start + count} are not all written")
        return found.view(self._dtype).view(count, -1)

    def __enter__(self) -> LogitFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
