"""The trained part: an encoder that gives every layer its prefix keys and values."""

import torch
from torch import Tensor, nn

from glmkern.model.config import ChatGLMConfig


class PrefixEncoder(nn.Module):
    """P-tuning v2 (Liu et al., 2022) in ChatGLM2's layout.

    One row of `embedding.weight` [P, L * 2 * G * C] holds, for one prefix token, layer by layer the
    keys and then the values of all groups: column ((2 * layer + kv) * G + g) * C + c. With
    `projection` the rows first go through a two-layer MLP (`trans`) with a tanh between.
    Parameters are float32 whatever the base is, and start as PyTorch's defaults, N(0, 1).
    """

    def __init__(self, config: ChatGLMConfig, pre_seq_len: int, projection: bool = False):
        super().__init__()
        self.layers = config.num_layers
        self.groups, self.channels = config.multi_query_group_num, config.kv_channels
        self.embedding = nn.Embedding(pre_seq_len, config.kv_size, dtype=torch.float32)
        self.trans = (
            nn.Sequential(
                nn.Linear(config.kv_size, config.hidden_size, dtype=torch.float32),
                nn.Tanh(),
                nn.Linear(config.hidden_size, config.kv_size, dtype=torch.float32),
            )
            if projection
            else None
        )

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """(keys, values) of every layer, each float32 [P, G, C] and contiguous."""
        rows = self.embedding.weight if self.trans is None else self.trans(self.embedding.weight)
        segments = rows.view(-1, 2 * self.layers, self.groups, self.channels).transpose(0, 1)
        segments = segments.contiguous().unbind(0)  # 2L of [P, G, C]
        return list(zip(segments[::2], segments[1::2], strict=True))
