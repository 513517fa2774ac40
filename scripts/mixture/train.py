"""Training: AdamW on the next token's loss and the routers' balance, in as many processes as there are cores."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from offload.system.interrupts import held_back
from offload.system.progress import progress_bar
from scripts.mixture import state
from scripts.mixture.forward import losses
from scripts.mixture.shape import Shape
from scripts.mixture.tokens import Batches, Tokens

MICRO = 16  # windows that go through the model at once: what they need stays in a core's caches
SAY_STEPS = 20


@dataclass(frozen=True)
class Settings:
    """What the weights at the end depend on, beside shape and text."""

    tokens: int = 30_000_000
    length: int = 256  # of a window
    rows: int = 32  # windows of one step
    rate: float = 3e-3  # peak
    warm_share: float = 0.02  # of the steps
    last_rate: float = 0.05  # of the peak
    decay: float = 0.1
    precise: bool = False  # float32 products, not bfloat16
    seed: int = 0

    @property
    def steps(self) -> int:
        """How many there are in all."""
        return max(1, self.tokens // (self.rows * self.length))

    def rate_at(self, step: int) -> float:
        """The learning rate: a warm-up, then a cosine."""
        warm = max(1, round(self.warm_share * self.steps))
        along = (step + 1 - warm) / max(1, self.steps - warm)
        falling = self.last_rate + (1 - self.last_rate) * (1 + math.cos(math.pi * max(0.0, along))) / 2
        return self.rate * min(1.0, (step + 1) / warm) * falling


@dataclass(frozen=True)
class Step:
    """What one step said."""

    number: int
    next_token: float
    balance: float
    norm: float


class Run:
    """One of `workers` processes that train a model in step: each has a share of the windows, and all the weights."""

    def __init__(self, shape: Shape, settings: Settings, tokens: Tokens, rank: int = 0, workers: int = 1) -> None:
        self.settings, self.rank, self.workers = settings, rank, workers
        self.about = {"shape": asdict(shape), **asdict(settings)}
        self.balance = shape.balance
        self.model = shape.build(settings.seed)
        self.batches = Batches(tokens, settings.length, settings.rows, settings.seed)
        self.parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in self.parameters if (p.dim() > 1) == matrix], "weight_decay": decay}
            for matrix, decay in ((True, settings.decay), (False, 0.0))
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.95), fused=True)

    def step(self, number: int) -> Step:
        """Do step `number`."""
        rows = self.batches.step(number)[self.rank :: self.workers]
        said = torch.zeros(2)
        dtype = torch.float32 if self.settings.precise else torch.bfloat16
        for micro in rows.split(MICRO):
            found = losses(self.model, micro, dtype)
            share = len(micro) / self.settings.rows
            (share * (found.next_token + self.balance * found.balance)).backward()
            said += share * torch.stack([found.next_token.detach(), found.balance.detach()])
        if self.workers > 1:
            said = self._together(said)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate_at(number)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Step(number, float(said[0]), float(said[1]), float(norm))

    def _together(self, said: torch.Tensor) -> torch.Tensor:
        """Add up all workers' gradients; returns the sum of what they `said`."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        flat = torch.cat([said, *(gradient.flatten() for gradient in gradients)])
        dist.all_reduce(flat)
        said, *parts = flat.split([len(said), *(gradient.numel() for gradient in gradients)])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return said


def train(
    shape: Shape,
    settings: Settings,
    tokens: Tokens,
    path: Path,
    *,
    title: str = "training",
    workers: int = 1,
    save_minutes: float = 5.0,
    watch: Callable[[Step], object] | None = None,
) -> Any:
    """The trained stock model. What `path` has of this run is not done again; Ctrl-C saves before it is raised.

    `watch` is told of every step.
    """
    with tempfile.TemporaryDirectory() as meeting:
        where = f"file://{meeting}/store"
        context = multiprocessing.get_context("fork")
        others = [
            context.Process(target=_follow, args=(shape, settings, tokens, path, rank, workers, where), daemon=True)
            for rank in range(1, workers)
        ]
        for other in others:
            other.start()
        run = _join(shape, settings, tokens, 0, workers, where)
        try:
            _lead(run, path, title, save_minutes, watch)
        except BaseException:
            for other in others:  # they wait for a step that does not come
                other.terminate()
            raise
        finally:
            for other in others:
                other.join()
            if workers > 1:
                dist.destroy_process_group()
    return run.model


def _join(shape: Shape, settings: Settings, tokens: Tokens, rank: int, workers: int, where: str) -> Run:
    torch.set_num_threads(1)
    if workers > 1:
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=workers)
    return Run(shape, settings, tokens, rank, workers)


def _follow(shape: Shape, settings: Settings, tokens: Tokens, path: Path, rank: int, workers: int, where: str) -> None:
    """What the workers beside the first do."""
    os.setsid()  # Ctrl-C is for the first; and Linux shares the processor out between sessions first
    run = _join(shape, settings, tokens, rank, workers, where)
    done = state.load(path, run.model, run.optimizer, run.about)
    dist.barrier()
    for number in range(done, settings.steps):
        run.step(number)
    dist.destroy_process_group()


def _lead(run: Run, path: Path, title: str, save_minutes: float, watch: Callable[[Step], object] | None) -> None:
    """Do the steps that are left, save, and tell how it goes."""
    settings, whole = run.settings, True
    first = done = state.load(path, run.model, run.optimizer, run.about)
    if run.workers > 1:
        dist.barrier()  # nobody saves before all have loaded
    began = saved = time.monotonic()
    with progress_bar(title, settings.steps, done=done, keep=True) as bar:
        try:
            while done < settings.steps:
                whole = False
                with held_back():
                    said = run.step(done)
                    done, whole = done + 1, True
                bar.advance()
                if watch is not None:
                    watch(said)
                if done % SAY_STEPS == 0 or done == settings.steps:
                    speed = (done - first) * settings.rows * settings.length / (time.monotonic() - began)
                    _say(path.with_suffix(".jsonl"), title, said, speed)
                if time.monotonic() - saved > save_minutes * 60:
                    state.save(path, run.model, run.optimizer, done, run.about)
                    saved = time.monotonic()
        finally:
            if whole and done > first:
                state.save(path, run.model, run.optimizer, done, run.about)


def _say(log: Path, title: str, said: Step, speed: float) -> None:
    """Print a line, and keep it as JSON."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**asdict(said), "tokens_per_s": round(speed)}) + "\n")
    print(
        f"{title}, step {said.number + 1}: loss {said.next_token:.3f}, balance {said.balance:.3f}, "
        f"gradient {said.norm:.2f}, {speed:.0f} tokens/s",
        flush=True,
    )
