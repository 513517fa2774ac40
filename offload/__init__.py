"""Run Mixture-of-Experts language models that are too big for the GPU, exactly, inside a memory budget.

    from offload import OffloadedModel
    with OffloadedModel.from_pretrained("Qwen/Qwen3-30B-A3B", gpu_mem="8G") as model:
        ids = model.generate(**model.tokenizer("Hello", return_tensors="pt"), max_new_tokens=20)

Importing this package is cheap: torch and transformers are imported when a model is.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if (
    (sys.argv[:1], sys.orig_argv[-len(sys.argv) :][:1]) == (["-m"], ["offload"])  # while `python -m offload` begins
    and not sys.flags.isolated
    and not getattr(sys.flags, "safe_path", False)
):
    sys.path.append(sys.path.pop(0))  # the working directory: somebody's cache.py there is not ours

import cache
import predictors

if TYPE_CHECKING:
    from offload.model import OffloadedModel as OffloadedModel
    from offload.quality.evaluate import evaluate as evaluate
    from offload.simulation.compare import replay as replay

    __version__: str

__all__ = ["OffloadedModel", "__version__", "evaluate", "replay"]

for _package in (cache, predictors):
    if not (Path(_package.__file__ or "").parent / "py.typed").is_file():
        raise ImportError(
            f'offload needs its own package "{_package.__name__}", but Python found '
            f"{_package.__file__ or next(iter(_package.__path__))} first: rename or move that file or folder"
        )


from offload.system.instructions import hold_libraries  # noqa: E402 - imports a package of ours

hold_libraries()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("offload")
    if name == "OffloadedModel":
        from offload.model import OffloadedModel

        return OffloadedModel
    if name == "replay":
        from offload.simulation.compare import replay

        return replay
    if name == "evaluate":
        from offload.quality.evaluate import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
