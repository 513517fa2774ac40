"""llama.cpp as an engine of peers/bench.py, in its own interpreter: needs llama-cpp-python and NumPy only.

The model is mapped (mmap), computed on the CPU, and driven by token ids through the low-level API. Weights are not
repacked: llama.cpp's repacked copies are memory of the process's own, which a model larger than RAM has no room for.
With --resident it is read into memory instead, and repacked as this processor's kernels want it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.bench.serve import Answer, Handler, Request, explaining, serve, steps

_ERROR = 4  # ggml's log level


class Llama:
    """A loaded model and its context."""

    def __init__(self, path: Path, threads: int, context: int, ubatch: int, *, resident: bool = False) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        errors: list[str] = []

        def log(level: int, text: bytes, _: Any) -> None:
            if level == _ERROR:
                errors.append(text.decode(errors="replace").strip())

        self._log = llama_cpp.llama_log_callback(log)  # kept: C calls it
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        options.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE if resident else llama_cpp.LLAMA_LOAD_MODE_MMAP
        options.use_extra_bufts = resident
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise RuntimeError("; ".join(errors) or f"{path} cannot be loaded")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = context
        settings.n_ubatch = min(ubatch, context)
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError("; ".join(errors) or "no context can be made")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def forget(self) -> None:
        """Empty the KV cache."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def feed(self, ids: list[int]) -> NDArray[np.float32]:
        """Read `ids` in one pass; the logits after the last."""
        tokens = (self._api.llama_token * len(ids))(*ids)
        code = self._api.llama_decode(self._context, self._api.llama_batch_get_one(tokens, len(ids)))
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        logits = self._api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self._vocab,))


def handler(model: Llama) -> Handler:
    """Answers requests {"ids", "at_most_s", "prefill", "logits"}: times, choices, and a file of logits where named."""

    def handle(request: Request) -> Answer:
        model.forget()
        logits: list[NDArray[np.float32]] = []

        def feed(ids: list[int]) -> int:
            row = model.feed(ids)
            if "logits" in request:
                logits.append(row.copy())
            return int(row.argmax())

        answer = steps(request, feed)
        if logits:
            np.save(request["logits"], np.stack(logits))
        return answer

    return handle


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--ubatch", type=int, default=512, help="tokens a pass, where it has as many")
    parser.add_argument("--resident", action="store_true", help="hold all weights in memory, repacked")
    args = parser.parse_args()

    def load() -> Handler:
        return handler(Llama(args.gguf, args.threads, args.context, args.ubatch, resident=args.resident))

    return serve(lambda: explaining(load))


if __name__ == "__main__":
    sys.exit(main())
