"""The trained part: an encoder that gives every layer its prefix keys and values, and how a model
keeps several and uses one."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from glmkern.errors import InputError
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


class PrefixSwitch:
    """The part of a model that keeps several prefixes by name and puts one of them to use."""

    FIRST = "default"  # the name of the prefix that a model begins with

    def begin_prefixes(self) -> None:
        """Takes over the prefix encoder that the model was built with, if any."""
        # A plain dictionary, so that those not in use are no part of the model's state.
        self._prefixes = {} if self.prefix_encoder is None else {self.FIRST: self.prefix_encoder}

    @property
    def prefix_encoder(self) -> PrefixEncoder | None:
        """The trained part, or None for the plain base."""
        return self.transformer.prefix_encoder

    @property
    def prefix_names(self) -> list[str]:
        """The prefixes that use_prefix takes; the one the model was built with is "default"."""
        return list(self._prefixes)

    @property
    def prefix_name(self) -> str | None:
        """The prefix in use, or None for the plain base."""
        in_use = self.prefix_encoder
        return next((name for name, each in self._prefixes.items() if each is in_use), None)

    def load_prefix(self, path: str | Path, name: str) -> None:
        """Reads one more trained prefix, of any length and format, and keeps it as `name` for
        use_prefix. One that already has this name is replaced, also where it is in use.

        Raises:
            InputError: the prefix is missing, broken, or of another base or family.
        """
        from glmkern.checkpoint import check_family, check_prefix, describe_prefix, read_prefix

        state = read_prefix(path, self.config)
        check_family(path, self.config)
        length, _, projection = describe_prefix(state)
        check_prefix(state, self.config, length, projection, path)
        encoder = PrefixEncoder(self.config, length, projection)
        encoder.load_state_dict(state)
        in_use = name == self.prefix_name
        self._prefixes[name] = encoder
        if in_use:
            self.use_prefix(name)

    def use_prefix(self, name: str | None) -> None:
        """Computes with the prefix `name` from now on; None: with the plain base. It alone is
        `transformer.prefix_encoder`, is trained, and is in the state_dict.

        Raises:
            InputError: no prefix has this name.
        """
        if name is not None and name not in self._prefixes:
            loaded = ", ".join(self._prefixes) or "none"
            raise InputError(f"there is no prefix {name!r}; loaded: {loaded}")
        encoder = None if name is None else self._prefixes[name].to(self.device)
        self.config = replace(
            self.config,
            pre_seq_len=None if encoder is None else len(encoder.embedding.weight),
            prefix_projection=encoder is not None and encoder.trans is not None,
        )
        self.transformer.prefix_encoder = encoder
