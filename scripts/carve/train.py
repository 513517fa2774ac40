"""End-to-end distillation by KL against the dense teacher, and the perplexities that say how it went."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from scripts.carve.student import CarvedMLP, Corrected, Norm

CHUNK = 256  # tokens whose full-vocabulary distributions are held at once
STEP_S = 4.0  # seconds of gradients before an optimiser step
WARM_TOKENS = 3000
LAYERS_WEIGHT = 0.1  # of the layers' relative squared distances beside the KL
SAVE_MINUTES = 5.0


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


def _distance(guess: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the squared distance of two hidden states [1, T, H] relative to the second's square."""
    truth = truth.float()
    return ((guess.float() - truth).square().sum(-1) / truth.square().sum(-1)).sum()


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


@torch.no_grad()
def gate_weights(student: Any, documents: list[torch.Tensor]) -> list[float]:
    """The weights of a token's chosen experts, the heaviest first, averaged over tokens and layers; they sum to 1."""
    found: list[torch.Tensor] = []

    def see(mlp: Any, args: tuple[torch.Tensor]) -> None:
        scores = F.linear(args[0].float(), mlp.router).topk(mlp.shape.top_k, dim=-1).values
        found.append(torch.softmax(mlp.shape.router_scale * scores, -1).flatten(0, -2).mean(0))

    hooks = [layer.mlp.register_forward_pre_hook(see) for layer in student.model.layers]
    for ids in documents:
        student.model(ids[None])
    for hook in hooks:
        hook.remove()
    mean: list[float] = torch.stack(found).mean(0).tolist()
    return mean


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
        {"params": routers, "peak": rate / 4},
    ]


class Trainer:
    """Trains `student` towards `teacher`: KL of the next token over the vocabulary in use, and every layer's output.

    `workers` forked processes of one thread each share the documents. A step lasts STEP_S by the clock, so that a core
    that other programs keep busy only contributes fewer tokens; then gradients are summed over the workers.
    """

    def __init__(self, teacher: Any, student: Any, documents: list[torch.Tensor], rate: float, seed: int) -> None:
        self.teacher, self.student, self.documents, self.seed = teacher, student, documents, seed
        self.optimizer = torch.optim.AdamW(
            parameter_groups(student, rate), lr=rate, weight_decay=0.0, betas=(0.9, 0.98)
        )
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        seen = torch.cat(documents).unique()
        self.head = student.lm_head.weight[seen]  # the vocabulary that the text uses: a quarter of it
        self.queue: list[int] = []
        self.tokens = 0

    def run(self, minutes: float, workers: int, save: Callable[[], None]) -> None:
        """Train for `minutes` of wall clock, calling `save` every SAVE_MINUTES and at the end."""
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as meeting:
            where = f"file://{meeting}/store"
            fork = multiprocessing.get_context("fork")
            others = [
                fork.Process(target=self._work, args=(rank, workers, where, minutes, None), daemon=True)
                for rank in range(1, workers)
            ]
            for other in others:
                other.start()
            self._work(0, workers, where, minutes, save)
            for other in others:
                other.join()

    def _work(self, rank: int, workers: int, where: str, minutes: float, save: Callable[[], None] | None) -> None:
        if rank > 0:
            os.setsid()  # Linux shares the processor out between sessions first
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=workers)
        order = random.Random(self.seed + rank)
        began = saved = time.time()
        steps, recent = 0, None
        share = 0.0
        while share < 1:
            loss, count = self._gradients(rank, workers, order)
            share = (time.time() - began) / 60 / minutes
            kl, share = self._together(loss, count, share)
            self._update(share)
            steps += 1
            recent = kl if recent is None else 0.9 * recent + 0.1 * kl
            if rank == 0 and steps % 10 == 0:
                speed = self.tokens / (time.time() - began)
                print(
                    f"{share:.1%}, {steps} steps, {self.tokens} tokens ({speed:.0f}/s), KL {recent:.3f}",
                    flush=True,
                )
            if save is not None and (time.time() - saved > SAVE_MINUTES * 60 or share >= 1):
                save()
                saved = time.time()
        dist.destroy_process_group()

    def _gradients(self, rank: int, workers: int, order: random.Random) -> tuple[float, int]:
        """(summed KL, tokens) of the documents that one step has time for; adds to the gradients."""
        began = time.time()
        total, count = 0.0, 0
        while count == 0 or time.time() - began < STEP_S:
            if not self.queue:
                self.queue = list(range(rank, len(self.documents), workers))
                order.shuffle(self.queue)
            index = self.queue.pop()
            ids = self.documents[index][None]
            with torch.no_grad():
                truth = self.teacher.model(ids, output_hidden_states=True)
            guess = self.student.model(ids, output_hidden_states=True)
            kl = _KL.apply(guess.last_hidden_state[0], truth.last_hidden_state[0], self.head)
            loss = kl + LAYERS_WEIGHT * sum(map(_distance, guess.hidden_states[1:], truth.hidden_states[1:]))
            loss.backward()
            total += float(kl.detach())
            count += ids.shape[1]
        return total, count

    def _together(self, loss: float, count: int, share: float) -> tuple[float, float]:
        """Average gradients over the tokens of all workers; returns (mean KL per token, the largest share)."""
        facts = torch.tensor([loss, count], dtype=torch.float64)
        clock = torch.tensor(share, dtype=torch.float64)
        dist.all_reduce(facts)
        dist.all_reduce(clock, op=dist.ReduceOp.MAX)
        flat = torch.cat([p.grad.flatten() for p in self.parameters])
        dist.all_reduce(flat)
        flat /= facts[1]
        for parameter, grad in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = grad.view_as(parameter)
        self.tokens += int(facts[1])
        return float(facts[0] / facts[1]), float(clock)

    def _update(self, share: float) -> None:
        """One optimiser step; warm-up over WARM_TOKENS, then a cosine down to the end of the time."""
        warm = min(1.0, self.tokens / WARM_TOKENS)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * min(share, 1.0))))
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
