"""Experts that are still being computed when their layer returns: nobody sees what is not there yet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_heads import SHAPE, answers
from test_sublayer import OPTIONS, layers
from tiny import ids, open_model, same_bits, save
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from offload.formats.cpu import begun, native
from offload.formats.cpu.token_sublayer import AttentionSublayer
from offload.layers.chain import chains

pytestmark = pytest.mark.skipif(not native.level(), reason="our kernels do not run here")

SIZES = {**SHAPE, "intermediate_size": 64, "moe_intermediate_size": 64}
FAMILIES = ["qwen3_moe", "mixtral", "olmoe", "gpt_oss"]


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def going_on(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every sublayer, whether what it gets is still being computed."""
    found: list[bool] = []
    compute = AttentionSublayer.compute

    def noted(self: AttentionSublayer, *args: Any) -> Any:
        found.append(begun.is_under_way())
        return compute(self, *args)

    monkeypatch.setattr(AttentionSublayer, "compute", noted)
    return found


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Any]:
    save(tmp_path, "qwen3_moe", **SIZES)
    with open_model(tmp_path, **OPTIONS, experts="nf4") as model:
        yield model


def one_token(model: Any, **kwargs: Any) -> Any:
    """A token's pass, after that of a prompt which has brought all experts."""
    output = model(ids(1, 64), use_cache=True)
    return model(ids(1, 1), past_key_values=output.past_key_values, use_cache=True, **kwargs)


@pytest.mark.parametrize("kind", [{"experts": "nf4"}, {"experts": "nf4", "dense": "auto"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_go_on_and_give_the_same_bits(
    family: str, kind: dict[str, Any], tmp_path: Path, going_on: list[bool]
) -> None:
    save(tmp_path, family, **SIZES)
    with open_model(tmp_path, **OPTIONS | kind) as model:
        found = [answers(model) for _ in range(20)]
        assert not begun.is_under_way()
        count = len(layers(model))
        assert going_on[-count:] == [False] + [True] * (count - 1)  # the first one gets the embedding
        for layer in layers(model):
            layer.following = None
        going_on.clear()
        wanted = answers(model)
        assert not any(going_on)
    assert all(same_bits(a, b) for each in found for a, b in zip(each, wanted, strict=True))


def test_hooks_see_what_is_there(model: Any, going_on: list[bool]) -> None:
    seen: list[bool] = []

    def look(*_: Any) -> None:
        seen.append(begun.is_under_way())

    first, second, *_ = layers(model)
    ways = [
        (first.register_forward_hook, 1),
        (second.register_forward_pre_hook, 1),
        (register_module_forward_hook, 10),
        (register_module_forward_pre_hook, 10),
    ]
    for register, at_least in ways:
        hook = register(look)
        one_token(model)
        hook.remove()
        assert len(seen) >= at_least and not any(seen), register
        seen.clear()
    going_on.clear()
    one_token(model)
    assert any(going_on)


def test_a_layer_that_goes_by_modules_waits(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, second = one_token(model).logits, layers(model)[1]
    seen: list[bool] = []
    hook = second.input_layernorm.register_forward_pre_hook(lambda *_: seen.append(begun.is_under_way()))
    assert same_bits(one_token(model).logits, wanted)
    hook.remove()
    assert seen == [False, False]


def test_a_layer_whose_forward_was_replaced_gets_what_is_there(model: Any) -> None:
    for number in (0, 1):
        layer, seen = layers(model)[number], []
        forward = layer.forward

        def looking(*args: Any, own: Any = forward, found: list[bool] = seen, **kwargs: Any) -> Any:
            found.append(begun.is_under_way())
            result = own(*args, **kwargs)
            found.append(begun.is_under_way())
            return result

        layer.forward = looking
        one_token(model)
        del layer.forward
        assert len(seen) == 4 and not any(seen)


class _Between(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        self.seen.append(begun.is_under_way())
        return hidden_states


def test_a_module_that_was_put_between_layers_gets_what_is_there(model: Any) -> None:
    inner, between = model.module.model, _Between()
    for _ in range(2):  # torch's list is another dictionary after the first time
        inner.layers.insert(1, between)
        inner.config.num_hidden_layers += 1
        one_token(model)
        inner.config.num_hidden_layers -= 1
        del inner.layers[1]
        assert between.seen == [False, False]
        between.seen.clear()


def test_all_hidden_states_are_those_of_layers_that_do_not_go_on(model: Any) -> None:
    found = one_token(model, output_hidden_states=True).hidden_states
    for layer in layers(model):
        layer.following = None
    wanted = one_token(model, output_hidden_states=True).hidden_states
    assert len(found) == len(wanted) and all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_layer_that_is_called_outside_a_pass_returns_when_all_is_there(model: Any) -> None:
    seen: list[bool] = []
    first = layers(model)[0]
    told: list[Any] = []
    hook = first.register_forward_pre_hook(lambda _, args, kwargs: told.append((args, kwargs)), with_kwargs=True)
    one_token(model)
    hook.remove()
    args, kwargs = told[-1]
    with torch.no_grad():
        first(*args, **kwargs)
    seen.append(begun.is_under_way())
    assert seen == [False]


def test_after_an_error_nothing_goes_on(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = answers(model)
    policy = model.parts.runtime.manager.computing.policy
    on_event, events = policy.on_event, []

    def failing(event: Any) -> None:
        events.append(event)
        if len(events) == 3:
            raise ZeroDivisionError("a user's policy")
        on_event(event)

    monkeypatch.setattr(policy, "on_event", failing)
    with pytest.raises(ZeroDivisionError):
        one_token(model)
    assert not begun.is_under_way()
    monkeypatch.undo()
    assert all(same_bits(a, b) for a, b in zip(answers(model), wanted, strict=True))


class _Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), nn.Identity()])


class InTurn(_Chain):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, mask=mask)
        return x


class Numbered(_Chain):
    def forward(self, x: torch.Tensor, masks: list[torch.Tensor]) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x, masks[i])
        return x


class Added(_Chain):
    def forward(self, x: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            x = x + more
        return x


class AddedInCall(_Chain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x + 1)
        return x


class SeenBeside(_Chain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, residual=x.clone())
        return x


class OfSomeLayers(_Chain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[::2]:
            x = layer(x)
        return x


class Twice(_Chain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Other(_Chain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            y = layer(x)
        return y


@pytest.mark.parametrize("cls", [InTurn, Numbered, Added, AddedInCall, SeenBeside, OfSomeLayers, Twice, Other])
def test_chains_are_known_by_their_code(cls: Any) -> None:
    assert len(list(chains(cls()))) == (cls in (InTurn, Numbered))
