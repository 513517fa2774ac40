"""What stands where something else should: values for JSON fields and for options."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

ANY: Sequence[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 10**4, 10**9, 10**18, 10**30, 0.5, -0.5, 1e-40, 1e308),
    *(math.nan, math.inf, "", " ", "x", "0", "2", "0.7", "auto", "none", "\x1b[31mred", "é" * 3, "../x", "/dev/zero"),
    *("\ud800", "a" * 5000, [], [0], [-1], [[]], ["x"], {}, {"a": 1}, {"0": "x"}, {"x": {"y": [1, {}]}}),
]

_CONFIG: Mapping[str, Sequence[Any]] = {
    "hidden_act": ["gelu", "relu2", "nope", "swiglu"],
    "dtype": ["float32", "float16", "bfloat16", "torch.bfloat16", "auto", "int8", "float8_e4m3fn", 5],
    "torch_dtype": ["float16", "torch.float32", "auto", 16],
    "model_type": ["mixtral", "llama", "qwen2_moe", "gpt_oss", "olmoe", "bert", "t5", "jamba", "nope"],
    "architectures": [["LlamaForCausalLM"], ["Nope"], "MixtralForCausalLM", [3]],
    "tie_word_embeddings": [True, False, "false"],
    "use_cache": [False, "no"],
    "num_hidden_layers": [1, 3, 10**5],
    "layer_types": [["full_attention"], ["sliding_attention"] * 2, ["nope", "nope"], "full_attention"],
    "sliding_window": [1, 4, 10**7],
    "head_dim": [15, 8, 64],
    "rope_theta": [0.0, 1e-9, "10000"],
    "rope_parameters": [{"rope_type": "yarn"}, {"rope_type": "nope"}, {"rope_theta": 1e4, "rope_type": "default"}],
    "rope_scaling": [{"type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 0}, {"rope_type": "dynamic"}],
    "quantization_config": [{"quant_method": name} for name in ("fp8", "gptq", "awq", "mxfp4", "modelopt", "x", 3)],
    "auto_map": [{"AutoModelForCausalLM": "modeling_x.X"}, {"AutoConfig": "configuration_x.X"}],
    "_attn_implementation": ["eager", "flash_attention_2", "flex_attention", "nope"],
    "attn_implementation": ["flash_attention_3", "sdpa"],
    "id2label": [3, {"a": "b"}, {"0": 1}],
    "pad_token_id": [259, 260, 100_000],
    "mlp_only_layers": [[0], [0, 1], [5], "0"],
    "decoder_sparse_step": [2, 3, 0],
    "scoring_func": ["sigmoid", "nope"],
    "topk_method": ["greedy", "nope"],
    "attention_bias": [True],
    "output_attentions": [True],
    "output_hidden_states": [True],
    "output_router_logits": [True],
    "return_dict": [False],
}
_GENERATION: Mapping[str, Sequence[Any]] = {
    "do_sample": [True, "yes"],
    "temperature": [0, 0.0, 0.7, "0.7", -1.0, 1e-40, 2.0],
    "top_k": [0, -1, 1, 50, 1.5, 10**6],
    "top_p": [0, 0.0, 0.9, 1.5, "0.9"],
    "min_p": [0.1, 2],
    "typical_p": [0.5, 0],
    "num_beams": [2, 4, 0],
    "num_beam_groups": [2],
    "num_return_sequences": [2, 0],
    "penalty_alpha": [0.6],
    "repetition_penalty": [0, 1.2, -1, "1.1"],
    "no_repeat_ngram_size": [2, -1],
    "eos_token_id": ["257", [257, 10], [], "</s>", 10**6, [[1]]],
    "pad_token_id": ["257", -1, 300, [257]],
    "bos_token_id": ["x", 256],
    "stop_strings": ["a", ["x", "y"], [""], 5],
    "suppress_tokens": [[1, 2], "x", [10**6], list(range(260))],
    "begin_suppress_tokens": [[3], 3],
    "forced_bos_token_id": [5, 10**6],
    "forced_eos_token_id": [257, [257], 10**6],
    "bad_words_ids": [[[1]], [[]], [1]],
    "sequence_bias": [[[[1], 1.0]], {}],
    "cache_implementation": ["static", "quantized", "offloaded", "sliding_window", "nope", "dynamic"],
    "cache_config": [{"backend": "quanto"}, 3],
    "max_new_tokens": [1, 0, -3, 10**9, "5"],
    "max_length": [1, 20, 0, 10**9],
    "min_new_tokens": [2, 100, -1],
    "min_length": [3, 10**9],
    "use_cache": [False],
    "guidance_scale": [1.5],
    "assistant_model": ["x"],
    "prompt_lookup_num_tokens": [2, 0],
    "prefill_chunk_size": [2, 0, -1],
    "early_stopping": [True, "never", "x"],
    "watermarking_config": [{"bias": 1.0}, {"x": 1}],
    "token_healing": [True],
    "dola_layers": ["high", [1]],
    "output_scores": [True],
    "return_dict_in_generate": [True],
    "transformers_version": ["0.0.1", 5],
    "compile_config": [{"fullgraph": True}, 3],
    "max_time": [0, 1e-9],
    "remove_invalid_values": [True],
    "renormalize_logits": [True],
    "exponential_decay_length_penalty": [[1, 1.5], 3],
    "continuous_batching_config": [{}],
}
FIELDS: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "config.json": _CONFIG,
    "generation_config.json": _GENERATION,
    "tokenizer_config.json": {
        "tokenizer_class": ["LlamaTokenizer", "GPT2Tokenizer", "Nope", "TokenizersBackend", 5],
        "chat_template": ["", [], [{"name": "default", "template": "x"}], [{"name": "a", "template": "{{ x }}"}], 5],
        "model_max_length": [1, -1, 10**30],
        "eos_token": [None, {"content": "x"}, 5, "a"],
        "pad_token": [None, "é"],
        "add_bos_token": [True],
        "bos_token": ["<|im_start|>", 3],
        "auto_map": [{"AutoTokenizer": ["t.T", None]}],
        "response_schema": [{}, {"type": "object"}, 5, {"x-regex": "("}],
        "extra_special_tokens": [["a"], {"image_token": "<i>"}, 3],
    },
}


def another(random: Random, name: str, file: str, old: Any) -> Any:
    """A value to put where `old` is the field `name` of `file`."""
    special = FIELDS.get(file, {}).get(name, ())
    if special and random.random() < 0.5:
        return random.choice(special)
    if isinstance(old, int) and not isinstance(old, bool) and random.random() < 0.3:
        return random.choice([old + 1, old - 1, old * 2, old // 2, -old, old * 10**6, float(old), str(old)])
    return random.choice(ANY)
