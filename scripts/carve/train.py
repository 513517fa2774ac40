"""End-to-end distillation by KL against the dense teacher, and the perplexities that say how it went."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from .student import CarvedMLP, Corrected, Norm

CHUNK = 256  # tokens whose full-vocabulary distributions are held at once
STEP_TOKENS = 640
PROBE_STEPS = 60  # optimiser steps between two choices of the thread count


class _KL(torch.autograd.Function):
    """Sum over tokens of KL(teacher || student), from final hidden states [T, H] and the shared head [V, H].

    The gradient of KL by the student's logits is softmax(student) - softmax(teacher): it is made chunk by chunk
    in the forward pass, so that no [T, V] tensor outlives its chunk.
    """

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        gradient = torch.empty_like(student)
        for at in range(0, len(student), CHUNK):
            part = slice(at, at + CHUNK)
            guess = F.log_softmax(F.linear(student[part], head).float(), -1)
            truth = F.log_softmax(F.linear(teacher[part], head).float(), -1)
            share = truth.exp()
            total += (share * (truth - guess)).sum()
            gradient[part] = (guess.exp_().sub_(share)).to(student.dtype) @ head
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None


@torch.no_grad()
def perplexity(model: Any, documents: list[torch.Tensor]) -> float:
    """exp of the mean negative log-likelihood of every token but each document's first."""
    total = 0.0
    count = 0
    for ids in documents:
        logits = F.linear(model.model(ids[None]).last_hidden_state[0, :-1], model.lm_head.weight)
        total += float(F.cross_entropy(logits.float(), ids[1:], reduction="sum"))
        count += len(ids) - 1
    return math.exp(total / max(count, 1))


def parameter_groups(student: Any, rate: float) -> list[dict[str, Any]]:
    """Adam's groups; `rate` is the low-rank terms' peak learning rate."""
    low: list[torch.Tensor] = []
    fine: list[torch.Tensor] = []
    routers: list[torch.Tensor] = []
    for module in student.modules():
        if isinstance(module, Corrected):
            low += [module.a, module.b]
            fine.append(module.scale)
        elif isinstance(module, Norm):
            fine.append(module.weight)
        elif isinstance(module, CarvedMLP):
            routers.append(module.router)
    return [
        {"params": low, "peak": rate},
        {"params": fine, "peak": rate},
        {"params": routers, "peak": rate / 2},
    ]


class Trainer:
    """Trains `student` towards `teacher`, whose final hidden states are kept from the first epoch."""

    def __init__(
        self, teacher: Any, student: Any, documents: list[torch.Tensor], rate: float, seed: int
    ) -> None:
        self.teacher, self.student, self.documents = teacher, student, documents
        self.random = random.Random(seed)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(student, rate), lr=rate, weight_decay=0.0, betas=(0.9, 0.98)
        )
        self.truth: dict[int, torch.Tensor] = {}
        self.queue: list[int] = []
        self.tokens = 0

    def _next(self) -> int:
        if not self.queue:
            self.queue = list(range(len(self.documents)))
            self.random.shuffle(self.queue)
        return self.queue.pop()

    def step(self, share: float) -> float:
        """One optimiser step at `share` (0..1) of the budget; returns the mean KL per token in nats."""
        total = 0.0
        count = 0
        while count < STEP_TOKENS:
            index = self._next()
            ids = self.documents[index][None]
            if index not in self.truth:
                with torch.no_grad():
                    self.truth[index] = self.teacher.model(ids).last_hidden_state[0].clone()
            hidden = self.student.model(ids).last_hidden_state[0]
            loss = _KL.apply(hidden, self.truth[index], self.student.lm_head.weight)
            loss.backward()
            total += float(loss.detach())
            count += ids.shape[1]
        warm = min(1.0, (self.tokens + count) / 8000)
        for group in self.optimizer.param_groups:
            group["lr"] = (
                group["peak"] * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))
            )
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad /= count
        torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.tokens += count
        return total / count

    def run(self, minutes: float, save: Callable[[], None], save_every: float = 5.0) -> None:
        """Train for `minutes` of wall clock, calling `save` every `save_every` minutes and at the end."""
        began = saved = time.time()
        steps, recent = 0, None
        while (gone := (time.time() - began) / 60) < minutes:
            share = gone / minutes
            if steps % PROBE_STEPS == 4:
                fastest_threads(lambda at=share: self.step(at))
            kl = self.step(share)
            recent = kl if recent is None else 0.95 * recent + 0.05 * kl
            steps += 1
            if steps % 10 == 0:
                rate = self.tokens / (time.time() - began)
                print(
                    f"{gone:.1f} min, {steps} steps, {self.tokens} tokens ({rate:.0f}/s), KL {recent:.3f}",
                    flush=True,
                )
            if time.time() - saved > save_every * 60:
                save()
                saved = time.time()
        save()


def fastest_threads(work: Callable[[], object]) -> None:
    """Set torch's thread count to the faster of one and all cores, timed on `work`: other programs compete."""
    seconds = {}
    for threads in {1, os.cpu_count() or 1}:
        torch.set_num_threads(threads)
        began = time.time()
        work()
        seconds[threads] = time.time() - began
    torch.set_num_threads(min(seconds, key=lambda threads: seconds[threads]))
