"""The table of angles that each member of the family computes."""

import pytest
import torch
from diffusers.pipelines.kolors.text_encoder import RotaryEmbedding

from glmkern.model.config import ChatGLMConfig
from glmkern.model.rotary import rotary_table

CHATGLM3 = {"_name_or_path": "THUDM/chatglm3-6b"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_chatglm3_rounds_the_table_alone(dtype):
    """diffusers carries the modelling code of ChatGLM3."""
    config = ChatGLMConfig(seq_length=8192, extra=CHATGLM3)
    theirs = RotaryEmbedding(config.rotary_dim, original_impl=True, dtype=dtype)
    expected = theirs.forward_impl(8192, config.rotary_dim, dtype, torch.device("cpu"))
    table = rotary_table(config, dtype, "model")
    assert table.dtype == dtype
    assert torch.equal(table, expected)
    chatglm2 = rotary_table(ChatGLMConfig(seq_length=8192), dtype, "model")
    assert torch.equal(table, chatglm2) == (dtype == torch.float32)


def test_the_32k_variant_divides_positions():
    wide = rotary_table(ChatGLMConfig(seq_length=161, rope_ratio=16), torch.float32)
    assert torch.equal(wide[::16], rotary_table(ChatGLMConfig(seq_length=11), torch.float32))
