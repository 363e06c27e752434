"""The model against live runs of diffusers' ChatGLMModel and transformers' GlmForCausalLM."""

import pytest
import torch
import torch.nn.functional as F

from bench.oracles import diffusers_twin, relative_error, twin_forward
from glmkern.checkpoint import to_glm_state
from glmkern.model.computation import Computation
from tests.model.models import SMALL, padded_batch, small_model

TOLERANCE = 1e-5
SHAPES = {
    "two groups": {},
    "one group": dict(multi_query_group_num=1),
    "a group a head": dict(multi_query_group_num=4),
    "wide heads": dict(kv_channels=20, hidden_size=44, ffn_hidden_size=7, num_layers=1),
}
VARIANTS = {
    "heads interleaved": dict(multi_query_attention=False, multi_query_group_num=4),
    "LayerNorm": dict(rmsnorm=False),
    "residual after the norm": dict(apply_residual_connection_post_layernorm=True),
    "no final norm": dict(post_layer_norm=False),
    "biases everywhere": dict(add_bias_linear=True),
    "no bias": dict(add_qkv_bias=False),
    "no query-key scaling": dict(apply_query_key_layer_scaling=False),
    "float32 residual": dict(fp32_residual_connection=True),
    "epsilon": dict(layernorm_epsilon=1e-2),
}


def compare(model, batch, labels=True):
    """Logits, loss and every prefix gradient against diffusers."""
    twin = diffusers_twin(model)
    inputs = [batch["input_ids"], batch["attention_mask"], batch["position_ids"]]
    loss, logits = model(*inputs, batch["labels"])
    their_loss, their_logits = twin_forward(twin, *inputs, batch["labels"])
    real = batch["attention_mask"].bool()
    assert relative_error(logits[real].detach(), their_logits[real].detach()) < TOLERANCE
    assert loss.item() == pytest.approx(their_loss.item(), rel=TOLERANCE)
    if model.prefix_encoder is None:
        return
    loss.backward()
    their_loss.backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            error = relative_error(parameter.grad, theirs[name.removeprefix("transformer.")].grad)
            assert error < TOLERANCE, f"{name}: {error:.2e}"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(shape, projection, side):
    model = small_model(shape, projection=projection)
    compare(model, padded_batch([9, 1, 17, 4], SMALL["padded_vocab_size"], side))


@pytest.mark.parametrize("recompute", ["none", "mlp", "layer"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_configurations(variant, recompute):
    model = small_model(variant)
    model.computation = Computation(recompute=recompute)
    compare(model, padded_batch([7, 3], SMALL["padded_vocab_size"], "right"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_prefix(side):
    model = small_model(pre_seq_len=None)
    compare(model, padded_batch([5, 11], SMALL["padded_vocab_size"], side))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_native_glm(groups):
    """GlmForCausalLM without a prefix, and with one as past keys and values."""
    from transformers import DynamicCache, GlmConfig, GlmForCausalLM

    prefix = 5
    model = small_model(dict(multi_query_group_num=groups), pre_seq_len=prefix)
    state = {k: v for k, v in model.state_dict().items() if "prefix_encoder" not in k}
    values, glm_state = to_glm_state(state, model.config)
    glm = GlmForCausalLM(GlmConfig(**values)).eval()
    glm.load_state_dict(glm_state)
    batch = padded_batch([13, 13], SMALL["padded_vocab_size"], "right")
    ids, labels, positions = batch["input_ids"], batch["labels"], batch["position_ids"]

    segments = [
        (k.detach().requires_grad_(), v.detach().requires_grad_()) for k, v in model.prefix()
    ]
    cache = DynamicCache()
    for i, segment in enumerate(segments):
        cache.update(*(x.transpose(0, 1).expand(2, -1, -1, -1) for x in segment), i)
    logits = glm(
        ids,
        position_ids=positions,
        past_key_values=cache,
        attention_mask=torch.ones(2, prefix + 13),
    ).logits
    their_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss, ours = model(ids, position_ids=positions, labels=labels)
    assert relative_error(ours.detach(), logits.detach()) < TOLERANCE
    assert loss.item() == pytest.approx(their_loss.item(), rel=TOLERANCE)
    loss.backward()
    their_loss.backward()
    expected = torch.stack([x.grad for segment in segments for x in segment])  # [2L, P, G, C]
    gradient = model.prefix_encoder.embedding.weight.grad
    assert relative_error(gradient, expected.transpose(0, 1).flatten(1)) < TOLERANCE

    plain = small_model(dict(multi_query_group_num=groups), pre_seq_len=None)
    plain.load_state_dict(state)
    assert (
        relative_error(
            plain(ids, position_ids=positions).logits, glm(ids, position_ids=positions).logits
        )
        < TOLERANCE
    )
