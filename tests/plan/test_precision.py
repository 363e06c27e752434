"""What is kept and computed in which precision."""

import pytest
import torch

from glmkern.model.config import ChatGLMConfig
from glmkern.plan.precision import Precision
from tests.model.models import SMALL


@pytest.mark.parametrize(
    "stored, dtype, device, rope, bits, expected",
    [
        (
            "float16",
            "float32",
            "cpu",
            "float32",
            0,
            [
                "linears float16",
                "output layer float16",
                "activations float32",
                "angles float32",
                "no loss scale",
            ],
        ),
        (
            "float16",
            "bfloat16",
            "cpu",
            "model",
            4,
            [
                "4-bit codes with float16 scales",
                "layer bfloat16",
                "activations bfloat16",
                "angles bfloat16",
                "no loss scale",
            ],
        ),
        (
            "bfloat16",
            "float16",
            "cuda",
            "float32",
            8,
            [
                "8-bit codes with bfloat16 scales",
                "layer float16",
                "loss scale 65536, halved where the gradient overflows",
            ],
        ),
        (None, "float32", "cuda", "float32", 0, ["linears float32", "activations float32"]),
    ],
)
def test_precision(stored, dtype, device, rope, bits, expected):
    config = ChatGLMConfig.from_dict({**SMALL, "torch_dtype": stored})
    precision = Precision.of(config, getattr(torch, dtype), torch.device(device), rope)
    text = "\n".join(precision.lines(bits))
    assert all(words in text for words in expected)
    assert "prefix, its gradient and the optimiser float32" in text
