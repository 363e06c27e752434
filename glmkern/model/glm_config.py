"""The configuration of transformers' native GlmForCausalLM, to and from ChatGLM2's fields."""

from collections.abc import Mapping
from typing import Any

MODEL_TYPE = "glm"
SIZES = {
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
}
OPTIONS = {
    "attention_dropout": "attention_dropout",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
    "use_cache": "use_cache",
}
# What ChatGLM2 fixes and a native configuration may vary.
ROPE = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
FIXED = {"model_type": MODEL_TYPE, "hidden_act": "silu", **ROPE}
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
}
# Where the base came from: transformers ignores it, ChatGLMConfig.family goes by it.
NAME = "_name_or_path"


def official_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the ChatGLMConfig that a native config.json describes.

    RoPE may be in rope_parameters (transformers 5), or beside the other fields with rope_scaling
    (transformers 4); scaled linearly by 16 it is chatglm2-6b-32k's.
    Raises ValueError, naming the field, for an architecture that ChatGLM2 cannot express.
    """
    missing = [name for name in SIZES.values() if values.get(name) is None]
    if missing:
        raise ValueError(f"{missing[0]} is missing, which a configuration of model_type 'glm' has")
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(values.get(name) or {}, Mapping):
            raise ValueError(f"{name} is {values[name]!r}; it must be an object of fields")
    scaling = values.get("rope_scaling") or {}
    rope = {**(values.get("rope_parameters") or {}), **scaling}
    found = {**FIXED, **values, **rope}
    for name, value in FIXED.items():
        if found[name] != value:
            raise ValueError(f"{name} is {found[name]!r}; ChatGLM2 has it fixed at {value!r}")
    rope_type = scaling.get("type", rope.get("rope_type", "default"))
    if rope_type not in ("default", "linear"):
        raise ValueError(f"rope_type is {rope_type!r}; ChatGLM2 has 'default' or 'linear'")
    return {
        **{ours: values[theirs] for ours, theirs in SIZES.items()},
        **{ours: values[theirs] for ours, theirs in OPTIONS.items() if theirs in values},
        "multi_query_attention": True,
        "tie_word_embeddings": False,
        "torch_dtype": values.get("dtype") or values.get("torch_dtype"),
        "rope_ratio": rope.get("factor") if rope_type == "linear" else 1,
        "extra": {NAME: values[NAME]} if values.get(NAME) else {},
    }


def native_values(values: Mapping[str, Any], base: str | None) -> dict[str, Any]:
    """The arguments of a GlmConfig, which are also the content of its config.json.

    Args:
        values: every field of a ChatGLMConfig.
        base: the name of the published base; None where it is not known.

    Raises ValueError, naming the field, for a configuration GlmForCausalLM cannot express.
    """
    for name, fixed in NATIVE_FIXED.items():
        if values[name] != fixed:
            raise ValueError(
                f"{name} is {values[name]!r}; GlmForCausalLM has it fixed at {fixed!r}"
            )
    rope = {"rope_type": "default", **ROPE}
    if values["rope_ratio"] != 1:
        # Dividing the position or the frequency by it is the same.
        rope |= {"rope_type": "linear", "factor": float(values["rope_ratio"])}
    return {
        "architectures": ["GlmForCausalLM"],
        "model_type": MODEL_TYPE,
        **{theirs: values[ours] for ours, theirs in (SIZES | OPTIONS).items()},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_parameters": rope,
        "dtype": values["torch_dtype"],
        **({NAME: base} if base else {}),
    }
