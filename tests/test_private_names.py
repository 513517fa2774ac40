"""What of torch, transformers and huggingface_hub is used and not promised: an upgrade may break the files named here.

A name counts that begins with an underscore, and whatever is imported from inside a package that does not hand it out.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import pytest
from house import PACKAGES, files, named, parsed

USED = {
    "offload/assembly/caches.py": """
        transformers.PreTrainedModel._is_stateful: bool
        transformers.generation.utils says _is_user_defined
    """,
    "offload/assembly/as_transformers.py": """
        transformers.GenerationMixin._supports_logits_to_keep(self)
        transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES: OrderedDict
    """,
    "offload/assembly/one_generation.py": """
        transformers.generation.configuration_utils.ALL_STATIC_CACHE_IMPLEMENTATIONS: tuple
        transformers.generation.utils.MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL: tuple
    """,
    "offload/checkpoint/building.py": """
        torch.utils._device._device_constructors()
        torch.utils._pytree.tree_leaves(tree)
        transformers.AutoModelForCausalLM._model_mapping: _LazyAutoMapping
        transformers.PreTrainedConfig()._name_or_path: str
        transformers.PreTrainedConfig._experts_implementation: property
        transformers.dynamic_module_utils.get_class_from_dynamic_module(class_reference, pretrained_model_name_or_path)
        transformers.dynamic_module_utils.resolve_trust_remote_code(
            trust_remote_code, model_name, has_local_code, has_remote_code, error_message, upstream_repo)
        transformers.models.auto.auto_factory._get_model_class(config, model_mapping)
        transformers.models.auto.auto_factory.add_generation_mixin_to_remote_model(model_class)
    """,
    "offload/checkpoint/dequantize.py": """
        transformers.integrations.finegrained_fp8.Fp8Dequantize(hf_quantizer)
        transformers.integrations.mxfp4.FP4_VALUES: list
        transformers.integrations.mxfp4.Mxfp4Dequantize(hf_quantizer)
        transformers.quantizers.auto.AutoHfQuantizer.from_config(quantization_config)
        transformers.quantizers.auto.AutoQuantizationConfig.from_dict(quantization_config_dict)
    """,
    "offload/checkpoint/fit.py": """
        transformers.PreTrainedModel._keys_to_ignore_on_load_missing: NoneType
        transformers.PreTrainedModel._keys_to_ignore_on_load_unexpected: NoneType
    """,
    "offload/checkpoint/hub/files.py": """
        huggingface_hub.file_download.repo_folder_name(repo_id, repo_type)
    """,
    "offload/checkpoint/mapping.py": """
        transformers.core_model_loading.Concatenate(dim)
        transformers.core_model_loading.Interleave(dim)
        transformers.core_model_loading.MergeModulelist(dim)
        transformers.core_model_loading.Transpose(dim0, dim1)
    """,
    "offload/checkpoint/names.py": """
        transformers.conversion_mapping.get_model_conversion_mapping(model, key_mapping, hf_quantizer)
        transformers.core_model_loading.WeightConverter(source_patterns, target_patterns, operations)
        transformers.core_model_loading.WeightRenaming(source_patterns, target_patterns)
        transformers.core_model_loading.dot_natural_key(s)
        transformers.core_model_loading.rename_source_key(
            source_key, weight_renamings, weight_converters, base_model_prefix, meta_state_dict)
    """,
    "offload/checkpoint/parameter.py": """
        transformers.core_model_loading.Concatenate(dim)
        transformers.core_model_loading.MergeModulelist(dim)
    """,
    "offload/checkpoint/recipes.py": """
        transformers.PreTrainedModel._get_dtype_plan(self, dtype)
        transformers.core_model_loading.build_glob_alternation(globs)
    """,
    "offload/checkpoint/skeleton.py": """
        transformers.AutoModelForCausalLM._model_mapping: _LazyAutoMapping
        transformers.PreTrainedConfig._experts_implementation: property
        transformers.integrations.finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS: FP8ExpertsInterface
        transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS: ExpertsInterface
        transformers.integrations.moe.ExpertsInterface.register(key, value)
        transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts._apply_gate(self, gate_up_out)
    """,
    "offload/demo/gguf.py": """
        transformers.integrations.gguf.dequant.dequantize(data, ggml_type)
        transformers.integrations.gguf.reader.GgufHeader.from_file(gguf_path)
        transformers.integrations.gguf.reader.load_gguf_state_dict(header)
        transformers.integrations.gguf.reader.read_gguf_metadata(gguf_path, string_arrays)
    """,
    "offload/engine/fused/places.py": """
        transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts._apply_gate(self, gate_up_out)
    """,
    "offload/engine/hook.py": """
        transformers.integrations.moe.ExpertsInterface.register(key, value)
    """,
    "offload/engine/outputs.py": """
        transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts._apply_gate(self, gate_up_out)
    """,
    "offload/layers/gated.py": """
        transformers.activations.SiLUActivation()
        transformers.integrations.moe._default_apply_gate(self, gate_up_out)
        transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts._apply_gate(self, gate_up_out)
    """,
    "offload/layers/growing.py": """
        transformers.cache_utils.DynamicLayer()
        transformers.cache_utils.DynamicSlidingWindowLayer(sliding_window)
    """,
    "offload/layers/kept.py": """
        torch.nn.Module()._modules: dict
        torch.nn.Module()._parameters: dict
    """,
    "offload/layers/sinks.py": """
        torch.nn.Module()._forward_hooks: OrderedDict
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
            query, key, value, dropout_p, is_causal, attn_mask, scale)
    """,
    "offload/layers/router_products.py": """
        torch._C: module
    """,
    "offload/machine/compute.py": """
        transformers.integrations.moe._default_apply_gate(self, gate_up_out)
    """,
    "offload/formats/cpu/features.py": """
        torch.ops.aten._convert_weight_to_int4pack_for_cpu.default(self, innerKTiles)
    """,
    "offload/formats/cpu/nested.py": """
        torch.ops.aten._weight_int4pack_mm_for_cpu.default(self, mat2, qGroupSize, qScaleAndZeros)
    """,
    "offload/formats/int8.py": """
        torch.ops.aten._weight_int8pack_mm.default(self, mat2, scales)
    """,
    "offload/layers/across_passes.py": """
        torch.utils._pytree.tree_map(func, tree)
    """,
    "offload/layers/attention.py": """
        transformers.PreTrainedConfig._attn_implementation: property
        transformers.integrations.sdpa_attention.sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling)
    """,
    "offload/layers/autocast.py": """
        torch._C: module
        torch._C._is_any_autocast_enabled: builtin_function_or_method
    """,
    "offload/layers/filling.py": """
        torch.nn.Module()._buffers: dict
        transformers.PreTrainedModel._initialize_weights(self, module, is_custom_code)
        transformers.PreTrainedModel._move_missing_keys_from_meta_to_device(
            self, missing_keys, device_map, device_mesh, hf_quantizer)
        transformers.initialization says _is_hf_initialized
        transformers.utils.loading_report.LoadStateDictInfo(
            missing_keys, unexpected_keys, mismatched_keys, error_msgs, conversion_errors, skipped_pp_keys)
    """,
    "offload/layers/linear.py": """
        torch.nn.Module()._buffers: dict
    """,
    "offload/layers/sublayer.py": """
        torch.nn.Module()._forward_hooks: OrderedDict
        torch.nn.Module()._forward_pre_hooks: OrderedDict
    """,
    "offload/layers/chain.py": """
        torch.nn.Module()._forward_hooks: OrderedDict
        torch.nn.Module()._forward_pre_hooks: OrderedDict
        torch.nn.Module()._modules: dict
        torch.nn.modules.module._global_forward_hooks: OrderedDict
        torch.nn.modules.module._global_forward_pre_hooks: OrderedDict
    """,
    "offload/layers/moe_block.py": """
        torch.nn.Module()._forward_hooks: OrderedDict
        torch.nn.Module()._forward_pre_hooks: OrderedDict
        torch.nn.Module()._modules: dict
    """,
    "offload/layers/lookahead.py": """
        torch.Tensor()._version: int
    """,
    "offload/machine/overhead.py": """
        transformers.PreTrainedModel._from_config(config)
    """,
    "offload/plan/footprint.py": """
        torch.UntypedStorage()._cdata: int
        torch.utils._python_dispatch.TorchDispatchMode()
        torch.utils._pytree.tree_leaves(tree)
    """,
    "offload/plan/prepare.py": """
        transformers.PreTrainedConfig._attn_implementation: property
    """,
    "offload/talk/channels.py": """
        transformers.utils.chat_parsing.ResponseParser(response_template, prefix)
    """,
    "offload/talk/settings.py": """
        transformers.generation.streamers.BaseStreamer()
    """,
    "offload/talk/stream.py": """
        transformers.generation.streamers.BaseStreamer()
    """,
}
"""By file: each name with the arguments that are given to it, its type, or the module whose text has it."""

FOREIGN = ("huggingface_hub", "torch", "transformers")
PROMISED = {"huggingface_hub", "huggingface_hub.errors", "huggingface_hub.utils", "transformers", "transformers.utils"}
"""What hands names out to everybody."""
NAMED_TUPLES = {"_asdict", "_fields", "_replace"}
BY_TEXT = {"delattr", "getattr", "hasattr", "setattr"}


def rows(text: str) -> list[str]:
    """The entries of one file, each in one line."""
    entries = re.split(r"\s+(?=(?:huggingface_hub|torch|transformers)\.)", text.strip())
    return [" ".join(entry.split()).replace("( ", "(") for entry in entries]


@pytest.mark.parametrize("row", sorted({row for text in USED.values() for row in rows(text)}))
def test_what_is_not_promised_is_there_in_the_shape_that_is_used(row: str) -> None:
    if " says " in row:
        module, _, word = row.partition(" says ")
        assert word in inspect.getsource(pkgutil.resolve_name(module))
    elif ": " in row:
        name, _, kind = row.partition(": ")
        assert type(resolved(name)).__name__ == kind
    else:
        name, _, arguments = row.removesuffix(")").rpartition("(")
        given = [argument for argument in arguments.split(", ") if argument]
        parameters = [one for one in signature(resolved(name)) if not one.kind.name.startswith("VAR")]
        assert [one.name for one in parameters[: len(given)]] == given
        assert all(one.default is not one.empty for one in parameters[len(given) :])


def resolved(name: str) -> Any:
    """The object of that name; `Class()._x` is one of an object of the class."""
    kind, called, rest = name.partition("().")
    found = pkgutil.resolve_name(kind)
    return getattr(found(), rest) if called else found


def signature(function: Any) -> list[inspect.Parameter]:
    """The parameters of a function, a class, or an operation of torch's."""
    if hasattr(function, "_schema"):
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return [inspect.Parameter(each.name, kind) for each in function._schema.arguments]
    return list(inspect.signature(function).parameters.values())


def test_every_file_that_uses_such_a_name_says_so() -> None:
    ours = {name for path in files(*PACKAGES) for name in _defined(parsed(path))}
    found = {path.as_posix(): _used(parsed(path), ours) for path in files(*PACKAGES)}
    listed = {path: {_last(row) for row in rows(text)} for path, text in USED.items()}
    assert {path: names for path, names in found.items() if names} == listed


def test_the_walk_sees_every_kind_of_use() -> None:
    source = (
        "from transformers.deep import a\nfrom transformers import b\nfrom torch._c import d\nimport torch.nn\n"
        "x._e\ngetattr(x, '_f')\nself._g\nself._ours\nx._replace(h=1)\nx.__class__\nx._e._i"
    )
    assert _used(ast.parse(source), {"_ours"}) == {"a", "d", "_e", "_f", "_g", "_i"}


def _last(row: str) -> str:
    """The name by which an entry is found in a file: a method that is promised counts by its class."""
    if " says " in row:
        return row.rpartition(" ")[2]
    name = row.partition(": ")[0] if ": " in row else row.removesuffix(")").rpartition("(")[0]
    parts = name.split(".")
    parts = parts[:-1] if parts[-1] in ("default", "register") or parts[-1].startswith("from_") else parts
    return parts[-1]


def _used(tree: ast.Module, ours: set[str]) -> set[str]:
    found = {name.rpartition(".")[2] for name in named(tree) if _is_unpromised(name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") and node.attr in ours
            found.update({node.attr} - NAMED_TUPLES if _is_private(node.attr) and not own else ())
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BY_TEXT:
            words = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            found.update(word for word in words if _is_private(word))
    return found


def _is_unpromised(name: str) -> bool:
    package, inside, _ = name.partition(".")
    if package not in FOREIGN or not inside:
        return False
    deep = package != "torch" and name.rpartition(".")[0] not in PROMISED
    return deep or any(_is_private(part) for part in name.split("."))


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _defined(tree: ast.Module) -> Iterator[str]:
    """What this project's own classes and modules have."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.attr if isinstance(node, ast.Attribute) else node.id
