"""How alike experts are to the router: what the fallback `buddy` goes by."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from cache.errors import PolicyError
from offload.checkpoint.layout import ExpertMap
from offload.layers.router import family_of, router_beside


def gate_similarity(model: nn.Module, experts: ExpertMap) -> NDArray[np.float32]:
    """The cosine of every two rows of each layer's gate [L, E, E]; -1 for experts that a layer does not have.

    Raises PolicyError, naming the family, where a gate has no row for each expert.
    """
    similarity = np.full((len(experts.layers), experts.num_experts, experts.num_experts), -1, np.float32)
    for layer in experts.layers:
        weight = getattr(router_beside(model, layer)[1], "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or len(weight) != layer.num_experts:
            raise PolicyError(
                f'fallback "buddy" cannot serve the "{family_of(model)}" family: '
                f"the router beside {layer.path} is no linear layer with a row for each expert"
            )
        rows = functional.normalize(weight.detach().float(), dim=1)
        similarity[layer.index, : len(rows), : len(rows)] = (rows @ rows.t()).cpu().numpy()
    return similarity
