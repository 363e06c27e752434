"""Weights and configurations to and from transformers' native GlmForCausalLM."""

import pytest
import torch
from transformers import GlmConfig, GlmForCausalLM

from glmkern.checkpoint import expected_shapes, from_glm_state, read_base, to_glm_state, write_base
from glmkern.model.config import ChatGLMConfig


@pytest.fixture
def native():
    torch.manual_seed(5)
    config = GlmConfig(
        num_hidden_layers=2,
        vocab_size=37,
        hidden_size=20,
        intermediate_size=15,
        head_dim=8,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        attention_bias=True,
        pad_token_id=0,
        eos_token_id=2,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    )
    model = GlmForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert torch.equal(left[name], tensor), name


def test_from_native(native):
    state = native.state_dict()
    config, official = from_glm_state(state, native.config)
    assert {name: tuple(value.shape) for name, value in official.items()} == expected_shapes(config)
    assert (config.num_layers, config.padded_vocab_size, config.hidden_size) == (2, 37, 20)
    assert (config.ffn_hidden_size, config.kv_channels, config.seq_length) == (15, 8, 64)
    assert (config.num_attention_heads, config.num_groups) == (6, 3)
    assert (config.layernorm_epsilon, config.add_qkv_bias) == (1e-5, True)
    assert (config.eos_token_id, config.pad_token_id) == (2, 0)

    # q, k and v one below the other, in this order.
    ours, theirs = "transformer.encoder.layers.1.", "model.layers.1."
    fused = official[f"{ours}self_attention.query_key_value.weight"]
    bias = official[f"{ours}self_attention.query_key_value.bias"]
    for part, rows in {"q": slice(48), "k": slice(48, 72), "v": slice(72, 96)}.items():
        assert torch.equal(fused[rows], state[f"{theirs}self_attn.{part}_proj.weight"])
        assert torch.equal(bias[rows], state[f"{theirs}self_attn.{part}_proj.bias"])
    renamed = {
        f"{ours}self_attention.dense.weight": f"{theirs}self_attn.o_proj.weight",
        f"{ours}mlp.dense_h_to_4h.weight": f"{theirs}mlp.gate_up_proj.weight",
        f"{ours}mlp.dense_4h_to_h.weight": f"{theirs}mlp.down_proj.weight",
        f"{ours}input_layernorm.weight": f"{theirs}input_layernorm.weight",
        f"{ours}post_attention_layernorm.weight": f"{theirs}post_attention_layernorm.weight",
        "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "transformer.encoder.final_layernorm.weight": "model.norm.weight",
        "transformer.output_layer.weight": "lm_head.weight",
    }
    for name, native_name in renamed.items():
        assert torch.equal(official[name], state[native_name]), name


@pytest.mark.parametrize("bias", [True, False])
def test_there_and_back(native, bias):
    native = GlmForCausalLM(GlmConfig(**{**native.config.to_dict(), "attention_bias": bias}))
    config, official = from_glm_state(native.state_dict(), native.config.to_dict())
    assert config.add_qkv_bias is bias
    values, state = to_glm_state(official, config)
    assert_same(state, native.state_dict())
    rebuilt = GlmForCausalLM(GlmConfig(**values))
    rebuilt.load_state_dict(state, strict=True)
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(rebuilt(tokens).logits, native(tokens).logits)


def test_official_there_and_back(config, state):
    values, native = to_glm_state(state, config)
    again, official = from_glm_state(native, GlmConfig(**values))
    assert_same(official, state)
    for name in ("seq_length", "layernorm_epsilon", "num_groups", "qkv_size", "dtype", "kv_size"):
        assert getattr(again, name) == getattr(config, name)


def test_recorded_official_logits_from_the_native_model(golden):
    """The names are right: the official code's recorded logits come out of GlmForCausalLM."""
    from safetensors.torch import load_file

    folder = golden / "chatglm2_tiny"
    config = ChatGLMConfig.from_pretrained(folder)
    values, native = to_glm_state(load_file(folder / "weights.safetensors"), config)
    model = GlmForCausalLM(GlmConfig(**values)).eval()
    model.load_state_dict(native, strict=True)
    case = load_file(folder / "plain.safetensors")
    with torch.no_grad():
        logits = model(case["input_ids"]).logits
    error = (logits - case["logits"]).abs().max() / case["logits"].abs().max()
    assert error < 1e-5


def test_a_tied_output_layer_is_written_as_its_own_tensor(tmp_path, native):
    values = {**native.config.to_dict(), "tie_word_embeddings": True}
    tied = GlmForCausalLM(GlmConfig(**values))
    config, official = from_glm_state(tied.state_dict(), tied.config)
    assert config.tie_word_embeddings is False
    write_base(tmp_path, config, official)
    read = dict(read_base(tmp_path, config))
    assert torch.equal(
        read["transformer.output_layer.weight"], tied.state_dict()["model.embed_tokens.weight"]
    )


def test_configuration_of_transformers_4(native):
    values = native.config.to_dict()
    values |= {**values.pop("rope_parameters"), "torch_dtype": values.pop("dtype")}
    values["rope_scaling"] = None
    assert from_glm_state(native.state_dict(), values)[0].kv_channels == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; ChatGLM2 has it fixed at 'silu'"),
        ({"model_type": "glm4"}, "model_type is 'glm4'"),
        ({"rope_parameters": {"partial_rotary_factor": 1.0}}, "partial_rotary_factor is 1.0"),
        ({"rope_parameters": {"rope_theta": 5e6}}, "rope_theta is 5000000.0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_ratio is 2.0; it must be 1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 16.0}}, "rope_type is 'yarn'"),
        ({"head_dim": None}, "head_dim is missing, which a configuration"),
    ],
)
def test_native_configurations_that_chatglm2_cannot_express(native, change, message):
    values = {**native.config.to_dict(), **change}
    with pytest.raises(ValueError, match=message):
        from_glm_state(native.state_dict(), values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rmsnorm", False),
        ("post_layer_norm", False),
        ("apply_residual_connection_post_layernorm", True),
        ("add_bias_linear", True),
        ("multi_query_attention", False),
        ("fp32_residual_connection", True),
        ("hidden_dropout", 0.1),
        ("quantization_bit", 4),
    ],
)
def test_official_configurations_that_native_glm_cannot_express(config, state, name, value):
    setattr(config, name, value)
    with pytest.raises(ValueError, match=f"{name} is {value}; GlmForCausalLM has it fixed at"):
        to_glm_state(state, config)
