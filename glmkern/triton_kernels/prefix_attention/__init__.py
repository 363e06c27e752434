"""Attention over a shared prefix and packed causal sequences; the formulas are in
glmkern/ops/prefix_attention.py."""

from glmkern.triton_kernels.prefix_attention.backward import prefix_attention_bwd
from glmkern.triton_kernels.prefix_attention.decode import prefix_attention_decode_fwd
from glmkern.triton_kernels.prefix_attention.forward import prefix_attention_fwd

__all__ = ["prefix_attention_fwd", "prefix_attention_bwd", "prefix_attention_decode_fwd"]
