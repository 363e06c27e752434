"""The same training step by other software, built from a glmkern model so that the work is equal.

Three kinds, all in float32 and over the same prefix:

* glm_with_peft: GlmForCausalLM of transformers is ChatGLM2's architecture, and PEFT's prefix tuning
  is P-tuning v2; both are independent of this code. They share the model's weights, in its memory.
* official: ptuning/main.py with --quantization_bit. The official model as diffusers carries it, its
  layers' linears dequantised at every call, with the official backward: it keeps the input,
  dequantises again and computes the weight's gradient too, which autograd then drops. Four products
  a linear and step, the recomputed forward under gradient checkpointing among them. Prefix keys and
  values are concatenated and expanded to all heads, and every token gets logits.
* lean: what is left when all that is taken away but the kernels. Our own model, a linear being
  a dequantisation into one buffer, which all linears share, and a product by torch.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GlmConfig, GlmForCausalLM

from bench.oracles import diffusers_twin
from glmkern import ChatGLM, ChatGLMConfig, ops
from glmkern.checkpoint import to_glm_state
from glmkern.model.modules import FrozenLinear

BITS = 4


def glm_with_peft(model: ChatGLM, attention: str) -> PeftModel:
    """GlmForCausalLM with a PEFT prefix that computes what `model` computes.

    Args:
        model: in float32 with a prefix, without projection.
        attention: transformers' attention implementation, "eager" or "sdpa".
    """
    state = {k: v for k, v in model.state_dict().items() if "prefix_encoder" not in k}
    values, glm_state = to_glm_state(state, model.config)
    with torch.device("meta"):
        glm = GlmForCausalLM(
            GlmConfig(**values | {"use_cache": False}, attn_implementation=attention)
        )
    glm.load_state_dict(glm_state, assign=True)
    glm.model.rotary_emb = type(glm.model.rotary_emb)(glm.config)  # its table is not in the state
    config, prefix = model.config, model.prefix_encoder.embedding.weight.detach()
    peer = get_peft_model(
        glm,
        PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=len(prefix),
            num_layers=config.num_layers,
            token_dim=config.num_groups * config.kv_channels,
            num_attention_heads=config.num_groups,
        ),
    )
    prefix_of(peer).data = rotate_keys(prefix, len(prefix), model.cos_sin, config)
    return peer


def prefix_of(peer: PeftModel) -> torch.nn.Parameter:
    """PEFT's prefix, [P, L * 2 * G * C] in ChatGLM2's order."""
    return peer.prompt_encoder["default"].embedding.weight


def rotate_keys(rows: Tensor, positions: int, cos_sin: Tensor, config: ChatGLMConfig) -> Tensor:
    """Turns the keys of prefix rows [P, L * 2 * G * C] by `positions` of the rotary embedding.

    ChatGLM2 counts the real tokens from 0, PEFT from P; (R_{p+P} q) . (R_P k) = (R_p q) . k, so a
    prefix moves from here to there with its keys turned by P, and its gradient back by -P.
    `cos_sin` is the model's rotary table.
    """
    turn = cos_sin[abs(positions)].clone()  # [C / 4, 2]
    turn[:, 1] *= math.copysign(1, positions)
    segments = rows.view(len(rows), config.num_layers, 2, config.num_groups, config.kv_channels)
    keys, values = segments.unbind(2)  # [P, L, G, C]
    turned = ops.rope(
        keys.flatten(1, 2),
        turn.unsqueeze(0),
        torch.zeros(len(rows), dtype=torch.int64, device=rows.device),
    ).view_as(keys)
    return torch.stack([turned, values], 2).view_as(rows)


def official(model: ChatGLM, checkpointing: bool) -> nn.Module:
    """The official int4 scheme over `model`'s weights, in training mode without dropout.

    Args:
        model: dense; its weights are quantised here.
        checkpointing: recompute every block's forward pass, as the official script does.
    """
    twin = diffusers_twin(model).train()
    twin.dropout.p = 0.0
    replace_linears(twin.encoder, nn.Linear, OfficialLinear)
    twin.encoder.gradient_checkpointing = checkpointing
    twin.encoder._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=True)
    # enable_input_require_grads: the backward pass goes through the first layer's tokens too.
    twin.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output.requires_grad_()
    )
    return twin


class OfficialLinear(nn.Module):
    """The official quantised linear, made from a dense one; the bias is added apart."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.packed, self.scale, _ = ops.quantize(linear.weight, BITS)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = _OfficialProduct.apply(x.flatten(0, -2), self.packed, self.scale)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class _OfficialProduct(torch.autograd.Function):
    """x [T, in] times the dequantised weight."""

    @staticmethod
    def forward(ctx, x, packed, scale):
        ctx.save_for_backward(x, packed, scale)
        return x @ _OfficialProduct.dequantized(packed, scale).T

    @staticmethod
    def backward(ctx, dy):
        x, packed, scale = ctx.saved_tensors
        dx = dy @ _OfficialProduct.dequantized(packed, scale)
        return dx, dy.T @ x, None

    @staticmethod
    def dequantized(packed, scale):
        return ops.dequantize(ops.QuantizedWeight(packed, scale, BITS), scale.dtype)


def lean(model: ChatGLM) -> ChatGLM:
    """Turns a quantised model into its lean scheme, in place."""
    layers = model.transformer.encoder
    largest = max(
        linear.packed.numel() * 2 for linear in layers.modules() if isinstance(linear, FrozenLinear)
    )
    buffer = torch.empty(largest)
    replace_linears(layers, FrozenLinear, lambda linear: LeanLinear(linear, buffer))
    return model


class LeanLinear(nn.Module):
    """A quantised FrozenLinear by way of dense weights in `buffer`."""

    def __init__(self, linear: FrozenLinear, buffer: Tensor):
        super().__init__()
        self.packed, self.scale, self.bias, self.buffer = (
            linear.packed,
            linear.scale,
            linear.bias,
            buffer,
        )

    def project(self, x: Tensor, with_bias: bool = True) -> Tensor:
        return F.linear(x, self._weight(), self.bias if with_bias else None)

    def project_back(self, dy: Tensor) -> Tensor:
        return dy @ self._weight()

    def _weight(self) -> Tensor:
        """[out, in] in the buffer, until the next linear; the fastest of ten ways in plain torch
        (7 GB/s written, ops.dequantize's reference 1 GB/s)."""
        rows, packed_columns = self.packed.shape
        pairs = self.buffer[: 2 * self.packed.numel()].view(rows, packed_columns, 2)
        pairs[:, :, 0] = self.packed >> 4
        pairs[:, :, 1] = (self.packed << 4) >> 4
        return pairs.flatten(1).mul_(self.scale.unsqueeze(1))


def replace_linears(
    root: nn.Module, kind: type[nn.Module], make: Callable[[nn.Module], nn.Module]
) -> None:
    """Puts `make(linear)` in the place of every module of `kind` below `root`, one at a time."""
    for parent in list(root.modules()):
        for name, child in parent.named_children():
            if isinstance(child, kind):
                setattr(parent, name, make(child))
