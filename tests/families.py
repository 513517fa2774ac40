"""A tiny random model of every Mixture-of-Experts language model family that transformers ships.

Families are discovered, not listed: each generative class of transformers' auto mappings whose source builds
routed experts, shrunk from its own default configuration. `python tests/families.py` builds them all and
prints what each is.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from small_config import EXPERTS, OVERRIDES, shrink
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from offload.layers.across_passes import counted

OTHER_DESIGN: dict[str, str] = {
    "dbrx": "the weights of all experts are one flattened matrix",
    "diffusion_gemma": "generates by block diffusion, not token after token",
    "doge": "experts are rows of an embedding table",
    "jetmoe": "attention heads are experts too, in a layer of its own",
    "llama4_text": "every expert runs on every routed input in one batched product",
    "longcat_flash": "some experts are the identity; not dispatched through the experts interface",
    "nllb-moe": "an encoder-decoder with a whole feed-forward module for each expert",
    "step3p7": "not dispatched through the experts interface",
    "switch_transformers": "an encoder-decoder with a whole feed-forward module for each expert",
}
"""Families that may be refused, and what sets them apart from transformers' common experts interface."""


@dataclass(frozen=True)
class Family:
    """One architecture: `name` is its configuration's model type, `class_name` its class in transformers.

    `text_only` tells a causal language model from one that also takes images or sound.
    """

    name: str
    class_name: str
    text_only: bool

    @property
    def model_class(self) -> Any:
        """The class in transformers; imports its module."""
        return getattr(transformers, self.class_name)

    @property
    def may_be_refused(self) -> bool:
        """Whether the family is outside of what every offloading runtime for transformers must serve."""
        return self.name in OTHER_DESIGN or not self.text_only

    def config(self, **overrides: Any) -> PreTrainedConfig:
        """64 wide, about three layers, two or more of them with eight experts, of which up to three are chosen."""
        return shrink(self.model_class.config_class, OVERRIDES.get(self.name, {}) | overrides)

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        """A model with seeded random weights in `dtype`.

        No tensor stays at zeros or ones: biases, norm scales and the routers' correction biases are random.
        """
        torch.manual_seed(seed)
        model: PreTrainedModel = self.model_class._from_config(self.config(**overrides), dtype=dtype).eval()
        generator = torch.Generator().manual_seed(seed)
        saved = model.state_dict().keys()
        for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
            if name in saved:
                _randomise(name, tensor.data, generator)
        return model

    def save(self, folder: Path, dtype: torch.dtype, shard_size: str = "5GB", **overrides: Any) -> None:
        """Write `build` to `folder` as transformers does, in the family's own layout on disk."""
        self.build(dtype, **overrides).save_pretrained(folder, max_shard_size=shard_size)

    def resident(self, folder: Path, dtype: torch.dtype, **kwargs: Any) -> PreTrainedModel:
        """The checkpoint in `folder`, loaded whole by transformers: what offloading must equal, bit for bit.

        Weights move to memory of their own: in a mapped file they are aligned to 8 bytes only, which alone
        changes the last bits of a product.
        """
        model: PreTrainedModel = self.model_class.from_pretrained(folder, dtype=dtype, **kwargs).eval()
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        # MiniMax's own cache counts no tokens, which makes transformers' replies to padded batches wrong.
        if self.name == "minimax":
            model.register_forward_hook(lambda _, args, output: counted(output.past_key_values))
        for module in routed_experts(model):
            if hasattr(module, "has_gate") and module.config._experts_implementation != "grouped_mm":
                raise ValueError(f"{self.name}: experts run as {module.config._experts_implementation}")
        return model


def _randomise(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Random values of the size that trained ones have; routers are sharp, so that tokens take different experts."""
    noise = torch.randn(tensor.shape, generator=generator)
    if name.endswith("tid2eid"):  # which experts each token id takes, where a table says so
        tensor.copy_(torch.rand(len(tensor), EXPERTS, generator=generator).argsort()[:, : tensor.shape[1]])
    elif not tensor.is_floating_point() or re.search("slope_rate|_decay$", name):
        return  # the latter say how fast a state fades; at random rates it would grow for ever
    elif re.search("(correction|balancing|expert)_bias", name):
        tensor.add_((0.02 * noise).to(tensor.dtype))
    elif tensor.dim() >= 2:
        gain = 3 if re.search(r"router|\.gate\.", name) else 1
        tensor.copy_(gain * noise * tensor.shape[-1] ** -0.5)
    else:
        tensor.add_((0.1 * noise).to(tensor.dtype))


def routed_experts(model: torch.nn.Module) -> list[Any]:
    """The modules of `model` that hold the weights of routed experts, in order."""
    return [module for module in model.modules() if _experts_of(module)]


def expert_sizes(model: torch.nn.Module) -> list[int]:
    """Bytes of every routed expert of `model`, without the parameters that the experts of a layer share."""
    sizes: list[int] = []
    for module in routed_experts(model):
        experts = _experts_of(module)
        nbytes = sum(p.nbytes for p in module.parameters(recurse=False) if p.dim() >= 2)
        sizes += [nbytes // experts] * experts
    return sizes


def _experts_of(module: Any) -> int:
    """How many experts' weights are parameters of `module` itself; 0 for any other module."""
    own = dict(module.named_parameters(recurse=False))
    if "down_proj" in own and own["down_proj"].dim() == 3:
        return int(own["down_proj"].shape[0])
    return int(module.moe_num_experts) if "w1" in own and "v1" in own else 0


@functools.cache
def families() -> dict[str, Family]:
    """Every family of transformers' auto mappings that generates text and has routed experts, by name.

    A model that also sees or hears is left out where its language model is a class of its own. Imports no
    modeling code.
    """
    language = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    other = {
        **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    found: dict[str, Family] = {}
    modules: set[str] = set()
    for mapping in (language, other):
        # Some classes have several model types, the composite one first and that of the language model last.
        names = {class_name: name for name, class_name in mapping.items()}
        for class_name, name in names.items():
            module = transformers._class_to_module.get(class_name)
            if module is None or (mapping is other and module in modules) or not _has_experts(module):
                continue
            # The causal mapping names some classes that also see; their language model is there as well.
            if mapping is language and "Conditional" in class_name:
                continue
            modules.add(module)
            found[name] = Family(name, class_name, text_only=class_name.endswith("ForCausalLM"))
    return found


def _has_experts(module: str) -> bool:
    path = Path(transformers.__file__).parent.joinpath(*module.split(".")).with_suffix(".py")
    source = path.read_text(encoding="utf-8")
    return bool(re.search(r"\bself\.(experts|num_experts)\b|[Ee]xperts\(|MoE\(", source))


def describe(model: torch.nn.Module) -> str:
    """One line: how many experts there are, and what sets their module apart."""
    modules = routed_experts(model)
    first = modules[0]
    flags = [flag for flag in ("has_bias", "is_transposed", "has_post_expert_norm") if getattr(first, flag)]
    flags += [] if first.has_gate else ["no gate"]
    flags += [] if first.is_concatenated else ["interleaved"]
    return ", ".join([f"{len(modules)} MoE layers", f"{len(expert_sizes(model))} experts", *flags])


def main() -> None:
    """Build every family; print those that follow the experts interface, then the others with the reason."""
    logging.set_verbosity_error()
    served = [family for family in families().values() if family.name not in OTHER_DESIGN]
    for family in served:
        kind = "text" if family.text_only else "text, and images or sound"
        print(f"{family.name}: {describe(family.build())}; {kind}")
    print(f"{len(served)} families follow the experts interface, {len(OTHER_DESIGN)} have another design:")
    for name, reason in OTHER_DESIGN.items():
        print(f"{name}: {reason}")


if __name__ == "__main__":
    main()
