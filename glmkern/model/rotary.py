"""The table of rotary angles."""

import torch
from torch import Tensor

from glmkern.model.config import ChatGLMConfig

BASE = 10000
PRECISIONS = ("float32", "model")


def rotary_table(
    config: ChatGLMConfig,
    dtype: torch.dtype,
    precision: str = "float32",
    device: torch.device | str | None = None,
) -> Tensor:
    """cos and sin of position / rope_ratio * BASE^(-2i / R'), R' = kv_channels / 2.

    Args:
        config: seq_length is the number of positions; kv_channels / 4 angles each.
        dtype: the model's.
        precision: "float32" computes angles and table in float32 (float64 in a float64 model);
            "model" reproduces the official code of config.family. ChatGLM2 and CodeGeeX2 round
            frequencies, positions and angles to the model's dtype. In float16 positions above 2,048
            are then no longer all distinct; the angle at position 1,000 is off by up to 0.39.
            ChatGLM3 rounds cosine and sine alone.

    Returns:
        [seq_length, kv_channels / 4, 2]: cosine and sine.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"rope_precision must be one of {', '.join(PRECISIONS)}, not {precision!r}"
        )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    table_dtype = dtype if precision == "model" else wide
    angle_dtype = wide if config.family == "chatglm3-6b" else table_dtype
    rotary_dim = config.rotary_dim
    channels = torch.arange(0, rotary_dim, 2, dtype=angle_dtype)
    theta = 1.0 / BASE ** (channels / rotary_dim)
    positions = torch.arange(config.seq_length, dtype=angle_dtype) / config.rope_ratio
    angles = torch.outer(positions, theta).to(wide)  # [positions, R]
    return torch.stack([angles.cos(), angles.sin()], -1).to(table_dtype).to(device)
