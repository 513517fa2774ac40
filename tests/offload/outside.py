"""What a process has outside of any model, before and after ours: `python outside.py FOLDER` prints what changes.

The model in FOLDER is loaded, generates and is closed; what each of these stages changes is one line of JSON.
"""

from __future__ import annotations

import gc
import importlib
import json
import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import transformers.models.auto.modeling_auto as auto
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

LIBRARIES = ("huggingface_hub", "torch", "transformers")
SHARED = ("json", "logging", "multiprocessing", "os", "pickle", "signal", "threading", "warnings")
COUNTERS = {"torch.utils.hooks RemovableHandle.next_id"}
"""What may differ without a reason."""


def outside() -> dict[str, Any]:
    """Whatever could be changed for others in this process, by name."""
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),  # noqa: PTH109 - as it is
        "locale": locale.setlocale(locale.LC_ALL),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "path": (list(sys.path), list(map(id, sys.meta_path))),
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook, sys.gettrace(), sys.getprofile()),
        "interpreter": (sys.getrecursionlimit(), sys.getswitchinterval(), gc.isenabled(), gc.get_threshold()),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "logging": {logger.name: (logger.level, list(logger.handlers), logger.disabled) for logger in _loggers()},
        "random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),  # noqa: NPY002
        "torch's threads": torch.get_num_threads(),
        "torch": (
            *(torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()),
            *(torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
            *(torch.backends.mkldnn.enabled, torch.overrides._len_torch_function_stack()),
            torch.tensor(1e-41).mul(1).item(),  # 0 where small numbers are flushed
        ),
        "causal models": dict(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        "experts functions": dict(ALL_EXPERTS_FUNCTIONS.items()),
        "code": dict(_code()),
    }


def _loggers() -> Iterator[logging.Logger]:
    yield logging.root
    for name, logger in sorted(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and not name.startswith("offload"):
            yield logger


def _code() -> Iterator[tuple[str, object]]:
    """Everything in the libraries' modules and classes, and each object's identity."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in (*LIBRARIES, *SHARED) or module is None:
            continue
        for key, value in list(vars(module).items()):
            yield f"{name} {key}", id(value)
            if isinstance(value, type) and value.__module__ == name:
                yield from ((f"{name} {key}.{inner}", id(one)) for inner, one in list(vars(value).items()))


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What differs, and of what has parts, which of them. What was not there, or None, may be there now."""
    found: dict[str, Any] = {}
    for name, old in before.items():
        new = after[name]
        if name == "code":
            lazy = COUNTERS | {key for key, one in old.items() if one == id(None)}
            found[name] = sorted(key for key in old if new.get(key) != old[key] and key not in lazy)
        elif name == "logging":
            found[name] = sorted(key for key in old if new.get(key) != old[key])
        elif isinstance(old, dict):
            found[name] = sorted(str(key) for key in {**old, **new} if new.get(key, _none) != old.get(key, _none))
        else:
            found[name] = [] if new == old else [repr(old), repr(new)]
    return {name: what for name, what in found.items() if what}


_none = object()


def main(folder: str) -> None:
    """Prints what each stage changes."""
    warnings.simplefilter("ignore")  # a library's old names are among what is looked at
    importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")  # has transformers replace itself
    seen = outside()

    def tell(stage: str) -> None:
        nonlocal seen
        now = outside()
        print(json.dumps({stage: changes(seen, now)}))
        seen = now

    from offload.model import OffloadedModel

    tell("import")
    model = OffloadedModel.from_pretrained(folder, cpu_mem="8G", device="cpu", context=64, threads=2)
    tell("load")
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4)
    tell("generate")
    model.close()
    tell("close")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
