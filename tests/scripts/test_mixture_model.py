"""The mixture's training pass computes what the stock class does."""

from __future__ import annotations

import pytest
import torch
from tiny_mixture import DENSE, SHAPE, VOCABULARY
from torch.nn import functional as F
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from scripts.mixture.experts import grouped
from scripts.mixture.forward import final_hidden, losses
from scripts.mixture.shape import Shape


@pytest.mark.parametrize("shape", [SHAPE, DENSE], ids=["mixture", "dense"])
def test_logits_are_the_stock_class(shape: Shape) -> None:
    model = shape.build(1)
    ids = torch.randint(VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden, _ = final_hidden(model, ids, torch.float32)
        torch.testing.assert_close(model.lm_head(hidden), model(ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("windows", [1, 5], ids=["some experts without a token", "all experts"])
@pytest.mark.parametrize("shape", [SHAPE, DENSE], ids=["mixture", "dense"])
def test_gradients_are_the_stock_class(shape: Shape, windows: int) -> None:
    model = shape.build(2)
    length = 2 if windows == 1 else 33
    ids = torch.randint(VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(0))
    found = losses(model, ids, torch.float32)
    found.next_token.backward()
    ours = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    loss = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    torch.testing.assert_close(found.next_token, loss)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(ours[name], weight.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_bfloat16_products_are_close() -> None:
    model = SHAPE.build(3)
    ids = torch.randint(VOCABULARY, (2, 33), generator=torch.Generator().manual_seed(0))
    exact, rounded = (float(losses(model, ids, dtype).next_token.detach()) for dtype in (torch.float32, torch.bfloat16))
    assert rounded == pytest.approx(exact, rel=1e-2)
    assert rounded != exact


def test_balance_is_the_usual_loss_of_each_layer() -> None:
    """transformers sums over all choices: with K of them, an even load gives K, ours 1."""
    model = SHAPE.build(4)
    ids = torch.randint(VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, ours = final_hidden(model, ids, torch.float32)
        logits = model(ids, output_router_logits=True).router_logits
    theirs = [load_balancing_loss_func((layer,), SHAPE.experts, SHAPE.top_k) / SHAPE.top_k for layer in logits]
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs))


def test_the_dense_twin_has_as_many_active_weights() -> None:
    routers = SHAPE.layers * SHAPE.experts * SHAPE.hidden
    every, active = SHAPE.parameters()
    assert DENSE.parameters() == (active - routers, active - routers)
    matrices = sum(weight.numel() for weight in SHAPE.build(0).parameters() if weight.dim() > 1)
    assert every == matrices
    assert DENSE.parameters()[0] == sum(weight.numel() for weight in DENSE.build(0).parameters() if weight.dim() > 1)


def test_each_pair_has_a_row_of_its_expert() -> None:
    chosen = torch.tensor([[0, 3], [3, 1], [0, 1], [3, 0]])
    places, tokens, parts = grouped(chosen, 5)
    assert len(set(places.flatten().tolist())) == chosen.numel()
    for token, experts in enumerate(chosen.tolist()):
        for choice, expert in enumerate(experts):
            row = int(places[token, choice])
            assert parts[expert].start <= row < parts[expert].stop
            assert int(tokens[row]) == token
    assert parts[2].start == parts[2].stop
