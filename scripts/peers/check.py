"""Do llama.cpp and we run the same model? Logits of its GGUF files beside transformers', on the same token ids.

    python scripts/peers/check.py --llama-python /venvs/llama/bin/python --work /data

For each family, a checkpoint of two layers in their true shape, converted to BF16 and Q4_0. The reference is
transformers in float32. Beside it stand transformers in bfloat16, which says how far rounding alone goes, transformers
with experts that return zeros, which says how much an error in them would show, and llama.cpp.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.bench.common import Args, Arguments, BenchmarkError, Result, note, random_ids, run
from scripts.bench.families import FAMILIES
from scripts.bench.make_checkpoint import write_checkpoint
from scripts.bench.workers import Worker
from scripts.peers.engines import HERE, gguf_command
from scripts.peers.make_gguf import TYPES

SHAPES = ("olmoe", "qwen3-30b-a3b", "gpt-oss-20b")
Logits = NDArray[np.float32]


def transformers_logits(checkpoint: Path, ids: list[int], dtype: str, *, experts: bool = True) -> Logits:
    """After each id, one a step, everything resident. Without `experts`, they return zeros."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    from offload.checkpoint.skeleton import find_experts

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, experts_implementation="grouped_mm")
    if not experts:
        for module in find_experts(model).values():
            module.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    cache = DynamicCache(config=model.config)
    rows = []
    with torch.inference_mode():
        for token in ids:
            output = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            rows.append(output.logits[0, -1].float().numpy())
    return np.stack(rows)


def llama_logits(python: Path, gguf: Path, ids: list[int], threads: int) -> Logits:
    """The same of llama.cpp."""
    command = [str(python), str(HERE / "llama_worker.py"), str(gguf), f"--threads={threads}", "--context=256"]
    file = gguf.with_suffix(".npy")
    with Worker("llama.cpp", command) as worker:
        worker.ask(ids=ids, logits=str(file))
    logits: Logits = np.load(file)
    file.unlink()
    return logits


def compare(logits: Logits, reference: Logits) -> dict[str, float]:
    """How often the choice is the same, and how far the logits are off, relative to the reference's norm."""
    error = np.linalg.norm(logits - reference, axis=1) / np.linalg.norm(reference, axis=1)
    return {
        "same_choice": float((logits.argmax(1) == reference.argmax(1)).mean()),
        "median_relative_error": float(np.median(error)),
        "largest_relative_error": float(error.max()),
    }


def check(args: Args) -> Result:
    """Every family's figures."""
    families: dict[str, Any] = {}
    ids = random_ids(args.tokens, args.vocab, seed=0)
    for name in args.shapes:
        family = replace(FAMILIES[name], layers=2, vocab=args.vocab, token_ids={})
        if args.tiny:
            small = {"hidden": 256, "heads": 4, "head_dim": 64, "intermediate": 128, "experts": 8, "top_k": 2}
            kv_heads = 4 if name == "olmoe" else 2
            family = replace(family, **small, kv_heads=kv_heads)  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory(dir=args.work, prefix=".check-") as folder:
            checkpoint = Path(folder) / "model"
            write_checkpoint(family, checkpoint)
            reference = transformers_logits(checkpoint, ids, "float32")
            without = transformers_logits(checkpoint, ids, "float32", experts=False)
            rows = {
                "transformers bfloat16": compare(transformers_logits(checkpoint, ids, "bfloat16"), reference),
                "transformers without experts": compare(without, reference),
            }
            for kind in TYPES:
                gguf = Path(folder) / f"{kind}.gguf"
                command = gguf_command(args.llama_python, checkpoint, kind, gguf)
                if subprocess.run(command, stdout=sys.stderr).returncode:
                    raise BenchmarkError(f"{kind} of {name} cannot be written: its own message is above")
                rows[f"llama.cpp {kind}"] = compare(llama_logits(args.llama_python, gguf, ids, args.threads), reference)
                gguf.unlink()
        families[name] = rows
        for engine, row in rows.items():
            note(f"{name}: {engine}: same choice {row['same_choice']:.2f}, error {row['median_relative_error']:.4f}")
    return {"families": families}


if __name__ == "__main__":
    arguments = Arguments(__doc__, tokens=48, threads=None)
    here = Path(sys.executable)
    arguments.positional("shapes", f"default: {' '.join(SHAPES)}", nargs="*", default=list(SHAPES))
    arguments.option("--llama-python", here, "an interpreter with llama-cpp-python and gguf", type=Path)
    arguments.option("--work", None, "a folder with 8 GB free, where /tmp has less", type=Path)
    arguments.option("--vocab", 32000, "tokens that the models know")
    arguments.option("--tiny", False, "small layers instead of their true shape")
    args = arguments.parse()
    if args.llama_python != here and shutil.which(args.llama_python) is None:
        arguments.error(f"--llama-python {args.llama_python}: there is no such program")
    raise SystemExit(run(check, args))
