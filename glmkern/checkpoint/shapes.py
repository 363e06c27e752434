"""The official names of the base model's weights and the shape of each.

In a quantised base the four linears of a layer have int8 codes as weights, two a byte for 4 bits.
<module>.weight_scale holds one scale a row. ops.quantize has the format.
"""

from glmkern.model.config import ChatGLMConfig

EMBEDDING = "transformer.embedding.word_embeddings.weight"
FINAL_NORM = "transformer.encoder.final_layernorm.weight"
OUTPUT_LAYER = "transformer.output_layer.weight"
# Its values are never read: the official code takes only its dtype and device.
INV_FREQ = "transformer.rotary_pos_emb.inv_freq"
LINEARS = (
    "self_attention.query_key_value",
    "self_attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)
WEIGHT, SCALE = ".weight", ".weight_scale"


def layer_prefix(layer: int) -> str:
    return f"transformer.encoder.layers.{layer}."


def is_linear_weight(name: str) -> bool:
    """Whether a quantised base holds this key as codes."""
    return name.endswith(tuple(linear + WEIGHT for linear in LINEARS))


def expected_shapes(config: ChatGLMConfig, bits: int = 0) -> dict[str, tuple[int, ...]]:
    """Every official key of the base, in the model's order, with its shape; no inv_freq.

    `bits` is that of the stored weights: 4 or 8 for codes with their scales, 0 for a dense base.
    """
    hidden, ffn, vocab = config.hidden_size, config.ffn_hidden_size, config.padded_vocab_size
    shapes = {EMBEDDING: (vocab, hidden)}
    for layer in range(config.num_layers):
        block = {
            "input_layernorm": (hidden,),
            "self_attention.query_key_value": (config.qkv_size, hidden),
            "self_attention.dense": (hidden, config.query_size),
            "post_attention_layernorm": (hidden,),
            "mlp.dense_h_to_4h": (2 * ffn, hidden),
            "mlp.dense_4h_to_h": (hidden, ffn),
        }
        for module, shape in block.items():
            name = layer_prefix(layer) + module
            shapes[name + WEIGHT] = shape
            if bits and module in LINEARS:
                shapes[name + WEIGHT] = (shape[0], shape[1] * bits // 8)
                shapes[name + SCALE] = shape[:1]
            if _has_bias(config, module):
                shapes[f"{name}.bias"] = shape[:1]
    if config.post_layer_norm:
        shapes[FINAL_NORM] = (hidden,)
        if not config.rmsnorm:
            shapes[FINAL_NORM.replace("weight", "bias")] = (hidden,)
    shapes[OUTPUT_LAYER] = (vocab, hidden)
    return shapes


def _has_bias(config: ChatGLMConfig, module: str) -> bool:
    if module.endswith("layernorm"):
        return not config.rmsnorm
    if module.endswith("query_key_value") and config.add_qkv_bias:
        return True
    return config.add_bias_linear
