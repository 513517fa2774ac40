"""AirLLM as an engine of peers/bench.py, in its own interpreter: needs airllm, torch and transformers only.

AirLLM first cuts the checkpoint into a file a layer, then streams every layer from disk in every pass. Our checkpoints
have no tokenizer, so that it is not asked for one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from scripts.bench.serve import Answer, Handler, Request, explaining, serve, steps


def load(checkpoint: Path, threads: int, layers: Path) -> Handler:
    """Load the model on the CPU; its layers are written to the folder `layers` where they are not there yet."""
    import torch
    from airllm.airllm_base import AirLLMBaseModel
    from transformers import DynamicCache

    class Streamed(AirLLMBaseModel):  # type: ignore[misc]
        def get_tokenizer(self, hf_token: Any = None) -> None:
            return None

    torch.set_num_threads(threads)
    model = Streamed(str(checkpoint), device="cpu", layer_shards_saving_path=str(layers), dtype=torch.bfloat16)

    def handle(request: Request) -> Answer:
        cache = DynamicCache(config=model.config)

        def feed(ids: list[int]) -> int:
            with torch.inference_mode():
                output = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
                return int(output.logits[0, -1].argmax())

        return steps(request, feed)

    return handle


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--layers", type=Path, required=True, help="the folder for its files of layers")
    args = parser.parse_args()
    return serve(lambda: explaining(lambda: load(args.checkpoint, args.threads, args.layers)))


if __name__ == "__main__":
    sys.exit(main())
