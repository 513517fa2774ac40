"""A decode step with everything in memory: time a token, beside what memory allows and beside plain transformers.

    python scripts/bench/make_checkpoint.py --like qwen3-30b-a3b --layers 4 --out /data/qwen3-4l
    python scripts/bench/step.py /data/qwen3-4l
    python scripts/bench/step.py /data/qwen3-4l --engines ours-bf16 transformers

`--against FOLDER` takes the same steps with another checkout of this project, its extension built in place, such as one
of the commit before: what a change has brought, side by side. Ratios are those of times to the other checkout's, or
without one to the last engine's.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

from scripts.bench.common import Args, Arguments, BenchmarkError, Result, ids_for, in_turn, ratio_of, show, warm_prompts
from scripts.bench.machine import memory_bytes_per_s
from scripts.bench.serve import same_choices
from scripts.bench.workers import Worker, engine_command

ENGINES: dict[str, dict[str, Any]] = {
    "ours-bf16": {"engine": "offload"},
    "ours-nf4": {"engine": "offload", "experts": "nf4", "dense": "nf4"},
    "transformers": {"engine": "transformers"},
}
BEFORE = ", before"
"""What the name of an engine of the other checkout ends in."""


def benchmark(args: Args) -> Result:
    """Load every engine, make every expert resident, let them take turns."""
    memory, prompts = memory_bytes_per_s(args.threads), warm_prompts(args.checkpoint, args.prompt)
    windows = [ids_for(args.checkpoint, args.tokens, len(prompts) + i) for i in range(args.repetitions)]
    with TemporaryDirectory(prefix="offload-step-") as store, ExitStack() as stack:
        workers = {}
        for name, command in _commands(args, Path(store)).items():
            workers[name] = stack.enter_context(Worker(name, command))
            for prompt in prompts:
                workers[name].ask(ids=prompt, prefill=True)

        def window(name: str, repetition: int) -> Result:
            (prompt_s,) = workers[name].ask(ids=prompts[0], prefill=True)["seconds"]
            answer = workers[name].ask(ids=windows[repetition])
            if (hit_rate := answer["stats"].get("hit_rate", 1)) < 1:
                raise BenchmarkError(f"{name}: hit rate {hit_rate:.1%}: free memory until all experts fit")
            return {"step_s": median(answer["seconds"]), "prompt_s": prompt_s, **answer}

        samples = in_turn(workers, args.repetitions, window)
    others = {name: _other(name, list(samples)) for name in samples}
    rows = {name: _figures(own, samples[others[name]], args.prompt, memory) for name, own in samples.items()}
    show(rows)
    ratios = {name: row["ratio"] for name, row in rows.items() if others[name] != name}
    return {"memory_bytes_per_s": memory, **rows, "ratios": ratios}


def _other(name: str, names: list[str]) -> str:
    """Whose times one's are divided by: the other checkout's, its own there, and else the last engine's."""
    before = name if name.endswith(BEFORE) else name + BEFORE
    return before if before in names else names[-1]


def _commands(args: Args, store: Path) -> dict[str, list[str]]:
    """The workers, by name. Each has its own store of converted experts: another checkout's may differ."""
    commands = {}
    for engine in args.engines:
        ours = ENGINES[engine]["engine"] == "offload"
        checkouts = {engine: None} | ({engine + BEFORE: args.against} if ours and args.against else {})
        for name, checkout in checkouts.items():
            options = ENGINES[engine] | {"threads": args.threads}
            if ours:
                options["context"] = max(args.prompt, args.tokens)
            if "experts" in options:
                options["expert_store"] = store / name.replace(", ", "-")
            commands[name] = engine_command(checkpoint=args.checkpoint, checkout=checkout, **options)
    return commands


def _figures(own: list[Result], others: list[Result], prompt: int, memory: float) -> Result:
    """Medians over the repetitions, and of ratios to `others`."""
    s_per_token = median(each["step_s"] for each in own)
    touched = own[0]["stats"].get("touched_bytes_per_token")
    return {
        "s_per_token": s_per_token,
        "ratio": ratio_of("step_s", own, others),
        "prefill_tokens_per_s": prompt / median(each["prompt_s"] for each in own),
        "prefill_ratio": ratio_of("prompt_s", own, others),
        "same_choice": mean(same_choices(own, others)),
        "touched_bytes_per_token": touched,
        "share_of_memory": touched and touched / s_per_token / memory,
    }


if __name__ == "__main__":
    arguments = Arguments(__doc__, "checkpoint", prompt=256, tokens=100, repetitions=7, threads=None)
    arguments.option("--engines", ["ours-bf16", "ours-nf4"], "in turn", choices=ENGINES)
    arguments.option("--against", None, "another checkout, to compare with", type=Path)
    raise SystemExit(arguments.run(benchmark))
