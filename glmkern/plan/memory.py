"""The parts of a training run's peak memory, counted from shapes; all sizes in bytes."""

import math

from glmkern.checkpoint.base import MAPPED_BYTES
from glmkern.checkpoint.shapes import (
    EMBEDDING,
    OUTPUT_LAYER,
    SCALE,
    expected_shapes,
    is_linear_weight,
)
from glmkern.model.config import ChatGLMConfig
from glmkern.ops.linear_cross_entropy import CHUNK_ELEMENTS, LEAST_CHUNK_ROWS
from glmkern.plan.precision import Precision
from glmkern.plan.work import RowLength

DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
# The prefix, its gradient, two moments; and what the layers see of it, with its gradient.
PREFIX_COPIES, SEGMENT_COPIES = 4, 2
# cuBLAS's work space, and one slab of dequantised weights, at most half the L2 cache.
GPU_WORK = 64 * 2**20


def base_bytes(
    config: ChatGLMConfig,
    precision: Precision,
    output_layer_bit: int = 0,
    offload_embedding: bool = False,
) -> int:
    """The frozen weights and the rotary table; config.quantization_bit is as they are computed."""
    weights, small = DTYPE_BYTES[precision.weights], DTYPE_BYTES[precision.activations]
    total = config.seq_length * config.kv_channels // 2 * DTYPE_BYTES[precision.rope]
    for name, shape in expected_shapes(config, config.quantization_bit).items():
        elements = math.prod(shape)
        if is_linear_weight(name):
            total += elements * (1 if config.quantization_bit else weights)
        elif name.endswith(SCALE):
            total += elements * DTYPE_BYTES[precision.scales]
        elif name == OUTPUT_LAYER and output_layer_bit:
            total += elements + shape[0] * DTYPE_BYTES[precision.scales]
        elif name == EMBEDDING and offload_embedding:
            continue
        else:
            total += elements * (weights if name in (EMBEDDING, OUTPUT_LAYER) else small)
    return total


def mapped_bytes(config: ChatGLMConfig, precision: Precision) -> int:
    """Pages of the weights' files that are resident while a CPU reads them: some, and a tensor."""
    tensor = (
        config.hidden_size
        * DTYPE_BYTES[precision.weights]
        * max(config.padded_vocab_size, 2 * config.ffn_hidden_size)
    )
    return min(MAPPED_BYTES + tensor, base_bytes(config, precision))


def prefix_parameters(config: ChatGLMConfig, pre_seq_len: int) -> int:
    """Trainable parameters: the prefix, and the MLP of --prefix_projection."""
    parameters = pre_seq_len * config.kv_size
    if config.prefix_projection:
        parameters += (2 * config.hidden_size + 1) * config.kv_size + config.hidden_size
    return parameters


def prefix_bytes(config: ChatGLMConfig, pre_seq_len: int) -> int:
    """Prefix, gradient and optimiser, and the keys and values made of it; all in float32."""
    return 4 * (
        PREFIX_COPIES * prefix_parameters(config, pre_seq_len)
        + SEGMENT_COPIES * pre_seq_len * config.kv_size
    )


def saved_bytes_per_token(config: ChatGLMConfig, dtype: str, recompute: str) -> int:
    """What one layer keeps of a token for its backward pass (model/layer.py)."""
    size, hidden = DTYPE_BYTES[dtype], config.hidden_size
    if recompute == "layer":
        return size * hidden
    # x and h; q and the attention's output; k and v; in float32 lse and two norms' statistics.
    kept = size * (2 * hidden + 2 * config.query_size + 2 * config.num_groups * config.kv_channels)
    kept += 4 * (config.num_attention_heads + 2)
    return kept + (size * 2 * config.ffn_hidden_size if recompute == "none" else 0)


def saved_bytes(config: ChatGLMConfig, pack: RowLength, dtype: str, recompute: str) -> int:
    """What a pack keeps for its backward pass: all layers, the last stream, and of the labelled
    tokens the output layer's gradient in float32."""
    last = DTYPE_BYTES[dtype] * config.hidden_size
    each = config.num_layers * saved_bytes_per_token(config, dtype, recompute) + last
    return pack.tokens * each + pack.labelled * 4 * config.hidden_size


def work_bytes(config: ChatGLMConfig, pack: RowLength, dtype: str, recompute: str) -> int:
    """What comes on top at the peak: the output layer's, or the last layer's, whichever is more."""
    size, hidden, ffn = DTYPE_BYTES[dtype], config.hidden_size, config.ffn_hidden_size
    # Gradients of the output, of the product with the gate and of gate and up.
    layer = size * (2 * hidden + 3 * ffn)
    if recompute != "none":
        layer += size * 2 * ffn
    if recompute == "layer":
        layer += saved_bytes_per_token(config, dtype, "mlp")
    rows = min(pack.labelled, max(CHUNK_ELEMENTS // config.padded_vocab_size, LEAST_CHUNK_ROWS))
    logits = rows * config.padded_vocab_size * 4
    # The final norm's output, and its labelled rows; the kept gradient of these once more.
    output = pack.tokens * hidden * size + pack.labelled * hidden * (size + 4)
    return max(pack.tokens * layer, logits + output)
