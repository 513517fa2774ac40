"""How a model ends that nobody closed: given up, as a file that nobody closed; or in a fork, where it never ran."""

from __future__ import annotations

import threading
import warnings
import weakref
from typing import Any

from offload.assembly.assemble import Assembly


def give_back_after(owner: Any, parts: Assembly) -> weakref.finalize[[Assembly], Any]:
    """Close `parts` once `owner` is gone, with a ResourceWarning; not at the end of the process, which takes all."""
    finalizer = weakref.finalize(owner, _give_back, parts)
    finalizer.atexit = False
    return finalizer


def _give_back(parts: Assembly) -> None:
    if parts.turns.in_fork:
        return
    try:
        name = parts.prepared.plan.model
        warnings.warn(f"unclosed OffloadedModel {name}: close it, or use it in a with block", ResourceWarning, 2)
    finally:
        # Python may find out on any thread, and in the midst of anything: on one of the model's own, which cannot wait
        # for its own end, or within another model's pass, whose number of threads is not to change.
        closing = threading.Thread(target=parts.close, name="offload-close")
        closing.start()
        if not threading.current_thread().name.startswith("offload-"):
            closing.join()
