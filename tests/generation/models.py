"""A small model for the real tokenizer."""

from typing import Any

import torch

from glmkern import ChatGLM
from tests.model.models import SMALL, small_model

POSITIONS = 300
TALKATIVE: dict[str, Any] = SMALL | dict(
    padded_vocab_size=65024,
    seq_length=POSITIONS,
    eos_token_id=2,
    pad_token_id=0,
    hidden_size=20,
    ffn_hidden_size=30,
    num_layers=2,
)
HISTORY = [("你好", "你好👋"), ("1+1", "2")]


def chat_model(**options: Any) -> ChatGLM:
    """A model that says nothing that the tokenizer has no text for, and comes to an end. Its base
    is always the same one."""
    torch.manual_seed(3)
    model = small_model(TALKATIVE, **options)
    model.transformer.output_layer.weight[64789:] = 0
    model.transformer.output_layer.weight[2] *= 5
    return model
