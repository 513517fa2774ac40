"""The engines of peers/bench.py that run in this project's own environment: ours, transformers and accelerate."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.bench.serve import Handler, explaining, serve

ENGINES = ("ours-bf16", "ours-nf4", "transformers", "accelerate")


def load(args: argparse.Namespace) -> Handler:
    """Load the engine that the command line names."""
    from scripts.bench import engines

    if args.engine == "transformers":
        engine = engines.load_transformers(args.checkpoint, args.threads)
    elif args.engine == "accelerate":
        engine = engines.load_accelerate(args.checkpoint, args.threads, args.folder)
    else:
        lower = {"experts": "nf4", "dense": "nf4", "expert_store": args.folder} if args.engine == "ours-nf4" else {}
        engine = engines.load_offload(args.checkpoint, args.threads, args.cpu_mem, args.context, **lower)
        model, stats = engine.model, engine.stats
        touched = touched_bytes(model.plan)
        engine = replace(engine, stats=lambda: stats() | {"touched_bytes_per_token": touched})
    if args.trace is not None:
        from cache.traces.trace import Trace
        from offload.traces.router import TraceRouter

        layers = range(engine.config.num_hidden_layers)
        TraceRouter(engine.model, Trace.open(args.trace), layers=layers).__enter__()  # until the process ends
    return engines.handler(engine)


def touched_bytes(plan: Any) -> int:
    """Bytes of weights that a decoded token is computed from, whether they were resident or not."""
    work = plan.work
    layer = work.dense_layer_bytes + work.top_k * plan.slot_bytes
    return int(plan.layers * layer + work.dense_pass_bytes)


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--cpu-mem", type=int, help="bytes; ours only")
    parser.add_argument("--folder", type=Path, help="of converted experts, or of accelerate's own files")
    parser.add_argument("--trace", type=Path, help="route by this trace's first layers")
    args = parser.parse_args()
    return serve(lambda: explaining(lambda: load(args)))


if __name__ == "__main__":
    sys.exit(main())
