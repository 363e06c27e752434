"""The ops: public functions, reference implementations and autograd, a file each."""

from glmkern.ops.bias_dropout import bias_dropout_add
from glmkern.ops.linear_cross_entropy import linear_cross_entropy
from glmkern.ops.prefix_attention import prefix_attention, prefix_attention_decode
from glmkern.ops.quant_linear import QuantizedWeight, dequantize, quant_linear, quantize
from glmkern.ops.rms_norm import add_rms_norm, rms_norm
from glmkern.ops.rope import rope
from glmkern.ops.swiglu import swiglu

__all__ = [
    "QuantizedWeight",
    "add_rms_norm",
    "bias_dropout_add",
    "dequantize",
    "linear_cross_entropy",
    "prefix_attention",
    "prefix_attention_decode",
    "quant_linear",
    "quantize",
    "rms_norm",
    "rope",
    "swiglu",
]
