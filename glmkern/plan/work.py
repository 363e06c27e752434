"""The useful arithmetic of a training step, counted from a configuration and the rows' lengths.

The base is frozen: a linear is one product forward and one back, and below the first layer's
attention no token gradient is due. Logits exist for labelled tokens only.
"""

from collections.abc import Sequence
from typing import NamedTuple

from glmkern.model.config import ChatGLMConfig

# Two products forward; back they are made again, and there are three more.
ATTENTION_BACKWARD = 2.5


class RowLength(NamedTuple):
    """Tokens of a row, or of several, and those of them that the model learns to predict."""

    tokens: int
    labelled: int


def step_flops(
    config: ChatGLMConfig,
    rows: Sequence[RowLength],
    pre_seq_len: int,
    recompute: str = "none",
    packs: int = 1,
) -> int:
    """Floating point operations of the rows, forward and backward; a multiply-add is two.

    Args:
        recompute: "none", "mlp" or "layer", what the backward pass computes again.
        packs: how many times the prefix is made, which --prefix_projection multiplies.
    """
    tokens = sum(row.tokens for row in rows)
    labelled = sum(row.labelled for row in rows)
    output = 2 * 2 * config.hidden_size * config.padded_vocab_size * labelled
    attention = config.num_layers * attention_flops(config, rows, pre_seq_len)
    again = recomputed_weights(config, recompute)
    total = linear_flops(config, tokens) + output + 2 * tokens * config.num_layers * again
    total += int((1 + ATTENTION_BACKWARD + (recompute == "layer")) * attention)
    if config.prefix_projection:
        # The two trained matrices, forward, and backward in both arguments.
        total += packs * 3 * 2 * 2 * pre_seq_len * config.kv_size * config.hidden_size
    return total


def linear_flops(config: ChatGLMConfig, tokens: int) -> int:
    """Of the four linears of every layer, forward and backward."""
    in_qkv = config.hidden_size * config.qkv_size
    return 2 * tokens * (2 * linear_weights(config) - in_qkv)


def linear_weights(config: ChatGLMConfig) -> int:
    """Elements of the four linears' weights, all layers."""
    return (
        config.num_layers
        * config.hidden_size
        * (config.qkv_size + config.query_size + 3 * config.ffn_hidden_size)
    )


def recomputed_weights(config: ChatGLMConfig, recompute: str) -> int:
    """Elements of the weights of one layer that are multiplied a second time."""
    gate_up = config.hidden_size * 2 * config.ffn_hidden_size
    attention = config.hidden_size * (config.qkv_size + config.query_size)
    return {"none": 0, "mlp": gate_up, "layer": gate_up + attention}[recompute]


def attention_flops(config: ChatGLMConfig, rows: Sequence[RowLength], pre_seq_len: int) -> int:
    """Of one layer's attention, forward: a token sees the prefix, itself and those before it."""
    scores = sum(n * (n + 1) // 2 + n * pre_seq_len for n, _ in rows)
    return 4 * config.num_attention_heads * config.kv_channels * scores
