"""transformers' native GlmForCausalLM: the same architecture under other names.

| official (transformer.)                       | native                                       |
|-----------------------------------------------|----------------------------------------------|
| embedding.word_embeddings                     | model.embed_tokens                           |
| encoder.layers.i.input_layernorm              | model.layers.i.input_layernorm               |
| encoder.layers.i.self_attention.query_key_value | model.layers.i.self_attn.{q,k,v}_proj      |
| encoder.layers.i.self_attention.dense         | model.layers.i.self_attn.o_proj              |
| encoder.layers.i.post_attention_layernorm     | model.layers.i.post_attention_layernorm      |
| encoder.layers.i.mlp.dense_h_to_4h            | model.layers.i.mlp.gate_up_proj              |
| encoder.layers.i.mlp.dense_4h_to_h            | model.layers.i.mlp.down_proj                 |
| encoder.final_layernorm                       | model.norm                                   |
| output_layer                                  | lm_head                                      |
"""

from collections.abc import Mapping
from typing import Any

import torch

from glmkern.checkpoint.shapes import EMBEDDING, FINAL_NORM, OUTPUT_LAYER, layer_prefix
from glmkern.model.config import ChatGLMConfig

OUTSIDE_LAYERS = {
    EMBEDDING: "model.embed_tokens.weight",
    FINAL_NORM: "model.norm.weight",
    OUTPUT_LAYER: "lm_head.weight",
}
IN_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.dense.weight": "self_attn.o_proj.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
    "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
}
FIELDS = {
    "num_layers": "num_hidden_layers",
    "padded_vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "kv_channels": "head_dim",
    "num_attention_heads": "num_attention_heads",
    "multi_query_group_num": "num_key_value_heads",
    "seq_length": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
    "add_qkv_bias": "attention_bias",
    "attention_dropout": "attention_dropout",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
    "use_cache": "use_cache",
}
# What ChatGLM2 fixes and a native configuration may vary.
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
# What a native configuration fixes and ChatGLM2 may vary.
NATIVE_FIXED = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "add_bias_linear": False,
    "multi_query_attention": True,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "quantization_bit": 0,
    "rope_ratio": 1,
}


def from_glm_state(
    state: Mapping[str, torch.Tensor], hf_config: Any
) -> tuple[ChatGLMConfig, dict[str, torch.Tensor]]:
    """The official configuration and state of a GlmForCausalLM.

    `hf_config` is a GlmConfig or its to_dict(). query_key_value is a new tensor; every other weight
    shares its memory with the one in `state`, except an output layer tied to the embedding.
    Raises ValueError, naming the field, for an architecture that ChatGLM2 cannot express.
    """
    values = dict(hf_config) if isinstance(hf_config, Mapping) else hf_config.to_dict()
    _check_native(values)
    fields = {ours: values[theirs] for ours, theirs in FIELDS.items() if theirs in values}
    config = ChatGLMConfig(
        multi_query_attention=True,
        tie_word_embeddings=False,
        torch_dtype=values.get("dtype") or values.get("torch_dtype"),
        **fields,
    )

    official = {EMBEDDING: state[OUTSIDE_LAYERS[EMBEDDING]]}
    for layer in range(config.num_layers):
        ours, theirs = layer_prefix(layer), f"model.layers.{layer}."
        for kind in ("weight", "bias") if config.add_qkv_bias else ("weight",):
            parts = [state[f"{theirs}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            official[f"{ours}self_attention.query_key_value.{kind}"] = torch.cat(parts)
        for name, native in IN_LAYER.items():
            official[ours + name] = state[theirs + native]
    official[FINAL_NORM] = state[OUTSIDE_LAYERS[FINAL_NORM]]
    tied = values.get("tie_word_embeddings", False)
    official[OUTPUT_LAYER] = (
        official[EMBEDDING].clone() if tied else state[OUTSIDE_LAYERS[OUTPUT_LAYER]]
    )
    return config, official


def to_glm_state(
    state: Mapping[str, torch.Tensor], config: ChatGLMConfig
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The arguments of a GlmConfig and the GlmForCausalLM state of official weights.

    Every tensor shares its memory with the one in `state`.
    Raises ValueError, naming the field, for a configuration GlmForCausalLM cannot express.
    """
    for name, value in NATIVE_FIXED.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} is {getattr(config, name)!r}; GlmForCausalLM has it fixed at {value!r}"
            )
    values = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    values |= {
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_parameters": dict(ROPE),
        "dtype": config.torch_dtype,
    }

    native = {theirs: state[ours] for ours, theirs in OUTSIDE_LAYERS.items()}
    group_size = config.num_groups * config.kv_channels
    for layer in range(config.num_layers):
        ours, theirs = layer_prefix(layer), f"model.layers.{layer}."
        for kind in ("weight", "bias") if config.add_qkv_bias else ("weight",):
            fused = state[f"{ours}self_attention.query_key_value.{kind}"]
            parts = fused.split([config.query_size, group_size, group_size])
            for part, tensor in zip("qkv", parts, strict=True):
                native[f"{theirs}self_attn.{part}_proj.{kind}"] = tensor
        for name, native_name in IN_LAYER.items():
            native[theirs + native_name] = state[ours + name]
    return values, native


def _check_native(values: dict[str, Any]) -> None:
    """transformers 4 has the RoPE fields beside the others, transformers 5 in rope_parameters."""
    fixed = {"model_type": "glm", "hidden_act": "silu", "rope_scaling": None, **ROPE}
    found = {**fixed, **values, **(values.get("rope_parameters") or {})}
    for name, value in fixed.items():
        if found[name] != value:
            raise ValueError(f"{name} is {found[name]!r}; ChatGLM2 has it fixed at {value!r}")
