"""The Triton implementations, a file or a package an op, for GPUs from sm_80 on.

`glmkern.dispatch` imports it when its op is first called with this backend; nothing else
imports Triton. The kernels name things as flash-linear-attention does: `i_` index, `o_` vector of
offsets, `m_` mask, `p_` pointers, `b_` block in registers; capitals are sizes.
"""
