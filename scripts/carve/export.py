"""The student as a carve file, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from offload.demo.carve import ATTENTION, FORMAT, MLP, NORMS, VERSION, Carve
from offload.demo.int8 import quantise
from scripts.carve.student import Corrected, Shape


def _linears(layer: Any) -> dict[str, Corrected]:
    parts = {name: getattr(layer.self_attn, name) for name in ATTENTION}
    return parts | {name: getattr(layer.mlp, name) for name in MLP}


@torch.no_grad()
def save_carve(student: Any, shape: Shape, path: Path) -> int:
    """Write the student's carve and corrections to `path`, atomically; returns the file's bytes."""
    layers = list(student.model.layers)
    tensors = {
        "order": torch.stack([layer.mlp.order for layer in layers]).to(torch.uint16),
        "router": torch.stack([layer.mlp.router for layer in layers]).half(),
        "norm": student.model.norm.weight.half(),
    }
    for name in NORMS:
        tensors[name] = torch.stack([getattr(layer, name).weight for layer in layers]).half()
    for name in ATTENTION + MLP:
        linears = [_linears(layer)[name] for layer in layers]
        a, a_step = quantise(torch.stack([linear.a for linear in linears]), dim=2)
        b, b_step = quantise(torch.stack([linear.b for linear in linears]), dim=1)
        scale = torch.stack([linear.scale for linear in linears]).half()
        tensors |= {f"{name}.a": a, f"{name}.a_step": a_step, f"{name}.b": b, f"{name}.b_step": b_step}
        tensors[f"{name}.scale"] = scale
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "experts": str(shape.experts),
        "top_k": str(shape.top_k),
        "shared": str(shape.shared),
        "router_scale": repr(shape.router_scale),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata)
    part.replace(path)
    return path.stat().st_size


@torch.no_grad()
def load_corrections(student: Any, carve: Carve) -> None:
    """Put a carve file's routers and corrections into a student that was built with its order."""
    student.model.norm.weight.copy_(carve.tensors["norm"])
    for index, layer in enumerate(student.model.layers):
        layer.mlp.router.copy_(carve.tensors["router"][index])
        for name in NORMS:
            getattr(layer, name).weight.copy_(carve.tensors[name][index])
        for name, linear in _linears(layer).items():
            linear.a.copy_(carve.tensors[f"{name}.a"][index] * carve.tensors[f"{name}.a_step"][index][:, None])
            linear.b.copy_(carve.tensors[f"{name}.b"][index] * carve.tensors[f"{name}.b_step"][index])
            linear.scale.copy_(carve.tensors[f"{name}.scale"][index])
