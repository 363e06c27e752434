"""One transformer block, forward and backward by hand, over packed tokens.

The base is frozen: a linear saves nothing, and its backward pass is one product with the weight.
Saved are the norms' inputs, rotated q and k, v, the attention's output and gate|up. `recompute`
trades parts of them for time. Below the first layer nothing is trained, so only the gradients of
its prefix are formed, not those of its tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glmkern.model.config import ChatGLMConfig
from glmkern.model.kernels import kernels
from glmkern.model.modules import FrozenLinear, FrozenNorm

# Where a layer drops: elements of the prefix, of the attention's output, of the MLP's output.
PREFIX_SITE, ATTENTION_SITE, MLP_SITE = range(SITES := 3)


# In inference: of what query_key_value projects, [T, (N + 2 G) C] without its bias, the output
# [T, N, C] over cached keys and values, which it extends.
Attend = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pass:
    """What all layers of one forward pass share. Inference needs only cos_sin and positions.

    cos_sin: [positions, C / 4, 2]; positions: int64 [T]; cu_seqlens: int32 [B+1]; sequence_ids:
    int64 [B]; seeds: int64 [SITES, layers, 2], see dropout_seeds; prefix_dropout, hidden_dropout:
    probabilities, 0 outside training.
    """

    cos_sin: Tensor
    positions: Tensor
    cu_seqlens: Tensor | None = None
    sequence_ids: Tensor | None = None
    seeds: Tensor | None = None
    prefix_dropout: float = 0.0
    hidden_dropout: float = 0.0
    recompute: str = "none"


def dropout_seeds(seed: int, offset: int, layers: int) -> Tensor:
    """(seed, offset) of every dropout of a forward pass, int64 [SITES, layers, 2], on the host.

    A layer's offset is `offset` (step * layers) plus its index. Its site is in the bits from 48 on,
    which this sum never reaches.
    """
    offsets = torch.arange(layers) + offset + (torch.arange(SITES).unsqueeze(1) << 48)
    return torch.stack([torch.full_like(offsets, seed), offsets], -1)


class Attention(nn.Module):
    """The two linears of self-attention, under their official names."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.query_key_value = FrozenLinear(
            config.hidden_size, config.qkv_size, config.add_bias_linear or config.add_qkv_bias
        )
        self.dense = FrozenLinear(config.query_size, config.hidden_size, config.add_bias_linear)


class MLP(nn.Module):
    """The two linears of the gated MLP, under their official names."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.dense_h_to_4h = FrozenLinear(
            config.hidden_size, 2 * config.ffn_hidden_size, config.add_bias_linear
        )
        self.dense_4h_to_h = FrozenLinear(
            config.ffn_hidden_size, config.hidden_size, config.add_bias_linear
        )


class Layer(nn.Module):
    """One block's weights; `forward` runs the block and its hand-written backward."""

    def __init__(self, config: ChatGLMConfig, index: int):
        super().__init__()
        self.index = index
        self.heads, self.groups = config.num_attention_heads, config.num_groups
        self.channels = config.kv_channels
        self.scale: float = self.channels**-0.5  # of the attention's scores
        self.interleaved = not config.multi_query_attention
        self.residual_after_norm = config.apply_residual_connection_post_layernorm
        self.input_layernorm = FrozenNorm(config)
        self.self_attention = Attention(config)
        self.post_attention_layernorm = FrozenNorm(config)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, run: Pass
    ) -> Tensor:
        """x [T, H] -> [T, H]; prefix_k, prefix_v: float32 [P, G, C] or None."""
        return _layer_function(x, prefix_k, prefix_v, self, run)

    def decode(self, x: Tensor, delta: Tensor | None, attend: Attend) -> tuple[Tensor, Tensor]:
        """Inference over cached keys and values, which `attend` extends.

        The stream is x + delta, both [T, H], or x where delta is None. The same of the result: the
        sum is the next norm's to make, in one pass.
        """
        if delta is None:
            normalised, _ = self.input_layernorm.normalize(x)
        else:
            normalised, x, _ = self.input_layernorm.add_and_normalize(delta, x)
        out = attend(self.self_attention.query_key_value.project(normalised, with_bias=False))
        normalised, h, _ = self.post_attention_layernorm.add_and_normalize(
            self.self_attention.dense.project(out.flatten(1)),
            normalised if self.residual_after_norm else x,
        )
        activated = self.mlp.dense_h_to_4h.project_to_swiglu(normalised)
        delta = self.mlp.dense_4h_to_h.project(activated)
        return (normalised if self.residual_after_norm else h), delta

    def rotated(self, qkv: Tensor, run: Pass) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, N, C] and k [T, G, C], rotated, and v [T, G, C] of qkv [T, (N + 2 G) C], to which
        the bias is added."""
        return kernels.qkv_rope_fwd(qkv, *self._rotation(run))

    def rotated_into(
        self, keys: Tensor, values: Tensor, slots: Tensor, qkv: Tensor, run: Pass
    ) -> Tensor:
        """q alone; k and v go to the entries `slots`, int64 [T], of keys and values
        [entries, G, C]."""
        return kernels.qkv_rope_cache_fwd(qkv, *self._rotation(run), keys, values, slots)

    def _rotation(self, run: Pass) -> tuple[Any, ...]:
        bias = self.self_attention.query_key_value.bias
        return bias, run.cos_sin, run.positions, self.heads, self.groups, self.interleaved

    def _qkv_gradient(self, dq: Tensor, dk: Tensor, dv: Tensor, run: Pass) -> Tensor:
        """The gradient of query_key_value's output from those of the rotated q, k and of v."""
        return kernels.qkv_rope_bwd(dq, dk, dv, run.cos_sin, run.positions, self.interleaved)


class SavedActivations(NamedTuple):
    """What the backward pass of a block reads, in the order in which autograd keeps it.

    stats1, stats2: the row statistics of the two norms; q, out: [T, N, C]; k, v: [T, G, C]; lse:
    float32 [T, N]; h: [T, H], the stream between attention and MLP; gate_up: [T, 2 F], None where
    the backward pass computes it again.
    """

    stats1: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    h: Tensor
    stats2: Tensor
    gate_up: Tensor | None


class _LayerFunction(torch.autograd.Function):
    """A block over a packed batch; its arguments are those of Layer.forward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        prefix_k: Tensor | None,
        prefix_v: Tensor | None,
        layer: Layer,
        run: Pass,
    ) -> Tensor:
        ctx.layer, ctx.run = layer, run
        y, saved = _run_block(layer, x, prefix_k, prefix_v, run)
        kept: tuple[Tensor | None, ...] = saved
        if run.recompute == "layer":
            kept = ()
        elif run.recompute == "mlp":
            kept = saved._replace(gate_up=None)
        ctx.save_for_backward(x, prefix_k, prefix_v, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(dy.device.type, enabled=False):
            return _run_backward(ctx, dy)


_layer_function: Callable[..., Tensor] = _LayerFunction.apply


def _run_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of _LayerFunction.forward's arguments."""
    layer: Layer = ctx.layer
    run: Pass = ctx.run
    x, prefix_k, prefix_v, *kept = ctx.saved_tensors
    if kept:
        saved = SavedActivations(*kept)
    else:
        saved, _ = _run_until_gate_up(layer, x, prefix_k, prefix_v, run)
    token_grad, prefix_grad = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])

    dh = _mlp_backward(layer, dy.contiguous(), saved, run)
    da = _dropout_backward(layer, dh, run, site=ATTENTION_SITE)
    dout = layer.self_attention.dense.project_back(da).view_as(saved.out)
    dq, dk, dv, *dprefix = kernels.prefix_attention_bwd(
        dout,
        saved.q,
        saved.k,
        saved.v,
        prefix_k,
        prefix_v,
        saved.out,
        saved.lse,
        *_sequences(run),
        _seed(layer, run, PREFIX_SITE),
        layer.scale,
        run.prefix_dropout,
        token_grad,
        prefix_grad,
    )
    dx = None
    if token_grad:
        dqkv = layer._qkv_gradient(dq, dk, dv, run)
        dnormalised = layer.self_attention.query_key_value.project_back(dqkv)
        dx = _norm_backward(layer, layer.input_layernorm, dnormalised, dh, x, saved.stats1)
    dprefix_k, dprefix_v = dprefix if prefix_grad else (None, None)
    return dx, dprefix_k, dprefix_v, None, None


def _run_block(
    layer: Layer, x: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, run: Pass
) -> tuple[Tensor, SavedActivations]:
    """The block's output [T, H], and what its backward pass reads."""
    saved, normalised = _run_until_gate_up(layer, x, prefix_k, prefix_v, run)
    assert saved.gate_up is not None
    y = _add_projected(
        layer,
        layer.mlp.dense_4h_to_h,
        kernels.swiglu_fwd(saved.gate_up),
        normalised if layer.residual_after_norm else saved.h,
        run,
        site=MLP_SITE,
    )
    return y, saved


def _run_until_gate_up(
    layer: Layer, x: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, run: Pass
) -> tuple[SavedActivations, Tensor]:
    """The block up to the first linear of the MLP; also that linear's input [T, H]."""
    normalised, stats1 = layer.input_layernorm.normalize(x)
    qkv = layer.self_attention.query_key_value.project(normalised, with_bias=False)
    q, k, v = layer.rotated(qkv, run)
    out, lse = kernels.prefix_attention_fwd(
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        *_sequences(run),
        _seed(layer, run, PREFIX_SITE),
        layer.scale,
        run.prefix_dropout,
    )
    dense, norm = layer.self_attention.dense, layer.post_attention_layernorm
    residual = normalised if layer.residual_after_norm else x
    if run.hidden_dropout == 0:
        normalised, h, stats2 = norm.add_and_normalize(dense.project(out.flatten(1)), residual)
    else:
        h = _add_projected(layer, dense, out.flatten(1), residual, run, site=ATTENTION_SITE)
        normalised, stats2 = norm.normalize(h)
    gate_up = layer.mlp.dense_h_to_4h.project(normalised)
    return SavedActivations(stats1, q, k, v, out, lse, h, stats2, gate_up), normalised


def _mlp_backward(layer: Layer, dy: Tensor, saved: SavedActivations, run: Pass) -> Tensor:
    """The gradient of h, the stream between attention and MLP, from that of the block's output."""
    gate_up = saved.gate_up
    if gate_up is None:
        gate_up = layer.mlp.dense_h_to_4h.project(
            layer.post_attention_layernorm.normalize(saved.h)[0]
        )
    dm = _dropout_backward(layer, dy, run, site=MLP_SITE)
    dgate_up = kernels.swiglu_bwd(layer.mlp.dense_4h_to_h.project_back(dm), gate_up)
    dnormalised = layer.mlp.dense_h_to_4h.project_back(dgate_up)
    return _norm_backward(
        layer, layer.post_attention_layernorm, dnormalised, dy, saved.h, saved.stats2
    )


def _norm_backward(
    layer: Layer, norm: FrozenNorm, dnormalised: Tensor, dresidual: Tensor, x: Tensor, stats: Tensor
) -> Tensor:
    """The gradient of a norm's input x; the residual left either before or after the norm."""
    if layer.residual_after_norm:
        return norm.backward(dnormalised + dresidual, x, stats, None)
    return norm.backward(dnormalised, x, stats, dresidual)


def _add_projected(
    layer: Layer, linear: FrozenLinear, x: Tensor, residual: Tensor, run: Pass, site: int
) -> Tensor:
    """dropout(linear(x)) + residual, the bias added with the residual."""
    p = run.hidden_dropout
    return kernels.bias_dropout_add_fwd(
        linear.project(x, with_bias=False),
        linear.bias,
        residual,
        p,
        _seed(layer, run, site),
        run.cu_seqlens,
        run.sequence_ids,
    )


def _dropout_backward(layer: Layer, dy: Tensor, run: Pass, site: int) -> Tensor:
    if run.hidden_dropout == 0:
        return dy
    seed = _seed(layer, run, site)
    assert seed is not None  # hidden_dropout is 0 outside training
    return kernels.bias_dropout_add_bwd(dy, run.hidden_dropout, seed, *_sequences(run), False)[0]


def _sequences(run: Pass) -> tuple[Tensor, Tensor]:
    """cu_seqlens [B+1] and sequence_ids [B] of a packed batch."""
    assert run.cu_seqlens is not None and run.sequence_ids is not None  # None in inference alone
    return run.cu_seqlens, run.sequence_ids


def _seed(layer: Layer, run: Pass, site: int) -> Tensor | None:
    """(seed, offset) of one dropout in this layer, or None outside training."""
    return None if run.seeds is None else run.seeds[site, layer.index]
