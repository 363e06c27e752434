"""The same training step by other software, built from a glmkern model so that the work is equal.

GlmForCausalLM of transformers is ChatGLM2's architecture, and PEFT's prefix tuning is P-tuning v2;
both are independent of this code. They share the model's weights, in its memory.
"""

import math

import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import GlmConfig, GlmForCausalLM

from glmkern import ChatGLM, ChatGLMConfig, ops
from glmkern.checkpoint import to_glm_state


def glm_with_peft(model: ChatGLM, attention: str) -> PeftModel:
    """GlmForCausalLM with a PEFT prefix that computes what `model` computes.

    Args:
        model: in float32 with a prefix, without projection.
        attention: transformers' attention implementation, "eager" or "sdpa".
    """
    state = {k: v for k, v in model.state_dict().items() if "prefix_encoder" not in k}
    values, glm_state = to_glm_state(state, model.config)
    with torch.device("meta"):
        glm = GlmForCausalLM(GlmConfig(**values | {"use_cache": False},
                                       attn_implementation=attention))
    glm.load_state_dict(glm_state, assign=True)
    glm.model.rotary_emb = type(glm.model.rotary_emb)(glm.config)  # its table is not in the state
    config, prefix = model.config, model.prefix_encoder.embedding.weight.detach()
    peer = get_peft_model(glm, PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=len(prefix), num_layers=config.num_layers,
        token_dim=config.num_groups * config.kv_channels, num_attention_heads=config.num_groups))
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
    turned = ops.rope(keys.flatten(1, 2), turn.unsqueeze(0),
                      torch.zeros(len(rows), dtype=torch.int64)).view_as(keys)
    return torch.stack([turned, values], 2).view_as(rows)
