"""What a predictor of the next experts is, and how to find one by name. Never imports torch.

A predictor watches routing events and says which experts the layers after the last one will need; whether fetching
them is worth the link is decided elsewhere. Like eviction policies, predictors know neither bytes nor devices nor wall
time: the same events give the same predictions, live and replayed. What only a running model can see, the next gates'
opinion of the present hidden state, reaches them as `RoutingEvent.ahead`, which a trace can record.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from cache.errors import PolicyError
from cache.registry import Part, Registry
from cache.types import ExpertKey, RoutingEvent

if TYPE_CHECKING:
    from cache.traces.trace import Trace


class Prediction(NamedTuple):
    """One expert that will be needed, the predictor says.

    `probability` lies in [0, 1]; `lead_layers` >= 1 is how many MoE layers after the last observed one it is
    needed, counted on into the next forward pass.
    """

    key: ExpertKey
    probability: float
    lead_layers: int


class Predictor(Part, ABC):
    """Watches the routing and says which experts the next layers will need; others decide to fetch."""

    causal: ClassVar[bool] = True
    """Whether it does not ask for the future. One that does learns the very trace that runs, and is never reset."""

    learns: bool = False
    """Whether it needs a profile, a recorded trace."""

    can_learn: ClassVar[bool] = False
    """Whether it makes use of a profile if there is one; set where `learn` is overridden."""

    similarity: float | None = None
    """How like the present what it goes by is, 0 to 1, if it can say."""

    reads: bool = False
    """Whether it goes by what a pass reads: somebody must call `begin`, where the tokens are known."""

    looks_ahead: bool = False
    """Whether it goes by `RoutingEvent.ahead`: somebody must look through the next gates, or have recorded it."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.can_learn = cls.learn is not Predictor.learn

    def __init__(self, num_layers: int, num_experts: int, params: Any = None) -> None:
        super().__init__(num_layers, num_experts, params)
        self.reset()

    def learn(self, profile: Trace) -> None:
        """Take from a recorded trace what can be known beforehand. Called at most once, before the first event."""

    def reset(self) -> None:
        """Forget the sequences seen so far; what was trained beforehand stays.

        Subclasses call this, then create their own state.
        """

    def begin(self, event: RoutingEvent) -> None:
        """A forward pass begins, whose `opening` is known. The event's layer is -1: `predict` counts from there."""

    @abstractmethod
    def observe(self, event: RoutingEvent) -> None:
        """Take note of one layer's routing. Events come in the order in which the layers run."""

    @abstractmethod
    def predict(self, depth: int) -> list[Prediction]:
        """The experts needed 1 to `depth` (at most the number of layers) layers after the last observed event, or after
        the beginning of a pass, if that came later.

        Each key once; by ascending lead, then descending probability. All candidates worth a thought, not just K of
        them: whoever fetches weighs the probabilities. No side effect.
        """


_MODULES = (
    *("activation_matrix", "cross_layer_gate", "ensemble", "expert_map", "first_layers", "frequency", "learned"),
    *("logistic", "none", "oracle", "path", "token_ids", "transition"),
)
_registry: Registry[Predictor] = Registry(
    "predictor",
    Predictor,  # type: ignore[type-abstract]
    [f"predictors.{module}" for module in _MODULES],
)
register = _registry.register
names = _registry.names
find_predictor = _registry.find
build_predictor = _registry.make
"""As `make_predictor`, without a profile, and without asking for one."""


def make_predictor(spec: str, num_layers: int, num_experts: int, profile: Trace | None = None) -> Predictor:
    """The predictor that `spec` names, such as "none", "transition(order=2)" or "my_module:MyPredictor".

    Raises PolicyError as `Registry.make` does, and for a predictor that needs a profile and gets none; TraceError for
    the profile of another model.
    """
    predictor = _registry.make(spec, num_layers, num_experts)
    if profile is None and predictor.learns:
        raise PolicyError(f'predictor "{predictor.name}" learns from a recorded trace: name one')
    if profile is not None and predictor.can_learn:
        profile.check_model(num_layers, num_experts)
        predictor.learn(profile)
        predictor.reset()
    return predictor
