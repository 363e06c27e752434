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

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from glmkern.checkpoint.shapes import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT_LAYER,
    expected_shapes,
    layer_prefix,
)
from glmkern.model.config import ChatGLMConfig
from glmkern.model.glm_config import MODEL_TYPE, official_values

LM_HEAD = "lm_head.weight"
OUTSIDE_LAYERS = {
    EMBEDDING: "model.embed_tokens.weight",
    FINAL_NORM: "model.norm.weight",
    OUTPUT_LAYER: LM_HEAD,
}
IN_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.dense.weight": "self_attn.o_proj.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
    "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
}


def native_config(folder: Path) -> dict[str, Any] | None:
    """The content of config.json where the folder holds a native base, else None."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    return values if values.get("model_type") == MODEL_TYPE else None


def glm_shapes(config: ChatGLMConfig) -> dict[str, tuple[int, ...]]:
    """Every native key of the base, in the model's order, with its shape."""
    official = expected_shapes(config).items()
    empty = ((name, torch.empty(shape, device="meta")) for name, shape in official)
    return {name: tuple(tensor.shape) for name, tensor in to_glm_stream(empty, config)}


def to_glm_stream(
    tensors: Iterable[tuple[str, torch.Tensor]], config: ChatGLMConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Native (key, tensor) pairs of official ones; each shares its memory with the official."""
    names, sizes = _native_names(config), _rows(config)
    for official, tensor in tensors:
        native = names[official]
        parts = tensor.split(sizes) if len(native) > 1 else (tensor,)
        yield from zip(native, parts, strict=True)


def from_glm_stream(
    tensors: Iterable[tuple[str, torch.Tensor]], config: ChatGLMConfig, tied: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Official (key, tensor) pairs of native ones.

    q, k and v wait for each other and become a new tensor; all else shares its memory with the
    native, except the output layer of `tied` embeddings, a copy.
    """
    names = _native_names(config)
    officials = {each: official for official, native in names.items() for each in native}
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        official = officials[name]
        native = names[official]
        parts = waiting.setdefault(official, {})
        parts[name] = tensor
        if len(parts) < len(native):
            continue
        del waiting[official]
        yield official, torch.cat([parts[each] for each in native]) if len(native) > 1 else tensor
        if tied and official == EMBEDDING:
            yield OUTPUT_LAYER, tensor.clone()


def from_glm_state(
    state: Mapping[str, torch.Tensor], hf_config: Any
) -> tuple[ChatGLMConfig, dict[str, torch.Tensor]]:
    """The official configuration and state of a GlmForCausalLM.

    `hf_config` is a GlmConfig or its to_dict(). Memory is shared as in from_glm_stream.
    Raises ValueError, naming the field, for an architecture that ChatGLM2 cannot express.
    """
    values = dict(hf_config) if isinstance(hf_config, Mapping) else hf_config.to_dict()
    config = ChatGLMConfig(**official_values(values))
    embedding, head = state[OUTSIDE_LAYERS[EMBEDDING]], state.get(LM_HEAD)
    tied = values.get("tie_word_embeddings", False)
    tied = tied and (head is None or head.data_ptr() == embedding.data_ptr())
    names = [name for name in glm_shapes(config) if not (tied and name == LM_HEAD)]
    stream = ((name, state[name]) for name in names)
    official = dict(from_glm_stream(stream, config, tied))
    return config, {name: official[name] for name in expected_shapes(config)}


def to_glm_state(
    state: Mapping[str, torch.Tensor], config: ChatGLMConfig
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The arguments of a GlmConfig and the GlmForCausalLM state of official weights.

    Every tensor shares its memory with the one in `state`.
    Raises ValueError, naming the field, for a configuration GlmForCausalLM cannot express.
    """
    values = config.to_glm_dict()
    stream = ((name, state[name]) for name in expected_shapes(config))
    return values, dict(to_glm_stream(stream, config))


def _native_names(config: ChatGLMConfig) -> dict[str, tuple[str, ...]]:
    """Official key to its native one, or to the three of query_key_value."""
    names = {official: (native,) for official, native in OUTSIDE_LAYERS.items()}
    for layer in range(config.num_layers):
        ours, theirs = layer_prefix(layer), f"model.layers.{layer}."
        names |= {ours + name: (theirs + native,) for name, native in IN_LAYER.items()}
        for kind in ("weight", "bias"):
            names[f"{ours}self_attention.query_key_value.{kind}"] = tuple(
                f"{theirs}self_attn.{part}_proj.{kind}" for part in "qkv"
            )
    return names


def _rows(config: ChatGLMConfig) -> list[int]:
    """Rows of q, k and v in query_key_value."""
    group_size = config.num_groups * config.kv_channels
    return [config.query_size, group_size, group_size]
