"""The registered ops that a layer calls, with their types; glmkern/ops has their formulas."""

from typing import Protocol, cast

import torch
from torch import Tensor

from glmkern import ops  # noqa: F401 (registers torch.ops.glmkern)


class Kernels(Protocol):
    """torch.ops.glmkern, as far as a model uses it.

    x, y, h, residual: [T, H]; q, out: [T, N, C]; k, v: [T, G, C]; prefix_k, prefix_v: [P, G, C].
    A gradient has the name and the shape of what it belongs to, with a d before it.
    """

    def rms_norm_fwd(self, x: Tensor, weight: Tensor, eps: float, /) -> tuple[Tensor, Tensor]:
        """(y, rstd)."""

    def add_rms_norm_fwd(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, /
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(y, h, rstd), h = x + residual."""

    def rms_norm_bwd(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        rstd: Tensor,
        dresidual: Tensor | None,
        weight_grad: bool,
        /,
    ) -> tuple[Tensor, Tensor]:
        """(dx, dweight)."""

    def quant_linear_fwd(
        self, x: Tensor, packed: Tensor, scale: Tensor | None, bits: int, bias: Tensor | None, /
    ) -> Tensor:
        """[T, out]."""

    def quant_linear_bwd(
        self, dy: Tensor, packed: Tensor, scale: Tensor | None, bits: int, /
    ) -> Tensor:
        """dx [T, in]."""

    def qkv_rope_fwd(
        self,
        qkv: Tensor,
        bias: Tensor | None,
        cos_sin: Tensor,
        positions: Tensor,
        heads: int,
        groups: int,
        interleaved: bool,
        /,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(q, k, v), q and k rotated."""

    def qkv_rope_bwd(
        self,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        cos_sin: Tensor,
        positions: Tensor,
        interleaved: bool,
        /,
    ) -> Tensor:
        """dqkv [T, (N + 2 G) C]."""

    def prefix_attention_fwd(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor | None,
        prefix_v: Tensor | None,
        cu_seqlens: Tensor,
        sequence_ids: Tensor,
        seed: Tensor | None,
        scale: float,
        p: float,
        /,
    ) -> tuple[Tensor, Tensor]:
        """(out, lse)."""

    def prefix_attention_bwd(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor | None,
        prefix_v: Tensor | None,
        out: Tensor,
        lse: Tensor,
        cu_seqlens: Tensor,
        sequence_ids: Tensor,
        seed: Tensor | None,
        scale: float,
        p: float,
        token_grad: bool,
        prefix_grad: bool,
        /,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(dq, dk, dv, dprefix_k, dprefix_v)."""

    def prefix_attention_decode_fwd(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        cache_lens: Tensor,
        prefix_k: Tensor | None,
        prefix_v: Tensor | None,
        q_lens: Tensor,
        scale: float,
        /,
    ) -> Tensor:
        """out [B, S, N, C] of q [B, S, N, C] over caches [B, room, G, C]."""

    def swiglu_fwd(self, x: Tensor, /) -> Tensor:
        """[T, F] of x [T, 2 F]."""

    def swiglu_bwd(self, dy: Tensor, x: Tensor, /) -> Tensor:
        """dx [T, 2 F]."""

    def bias_dropout_add_fwd(
        self,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        p: float,
        seed: Tensor | None,
        cu_seqlens: Tensor | None,
        sequence_ids: Tensor | None,
        /,
    ) -> Tensor:
        """dropout(x + bias) + residual."""

    def bias_dropout_add_bwd(
        self,
        dy: Tensor,
        p: float,
        seed: Tensor,
        cu_seqlens: Tensor,
        sequence_ids: Tensor,
        bias_grad: bool,
        /,
    ) -> tuple[Tensor, Tensor]:
        """(dx, dbias)."""


kernels = cast(Kernels, torch.ops.glmkern)
