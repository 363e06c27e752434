"""The arithmetic of a step, against what torch counts."""

from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.bench_full_size import chatglm2_6b
from bench.oracles import diffusers_twin
from glmkern.plan.work import RowLength, attention_flops, linear_flops, linear_weights, step_flops
from tests.model.models import small_model


def test_linear_flops_are_those_torch_counts():
    """Forward, in diffusers' model: the linears of all layers and the output layer."""
    model = small_model(pre_seq_len=None)
    twin, ids = diffusers_twin(model), torch.randint(100, (3, 17))
    with FlopCounterMode(display=False) as counter:
        hidden = twin(ids, use_cache=False, output_hidden_states=False, return_dict=False)[0]
        twin.output_layer(hidden)
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in counts.items() if "mm" in str(op))
    config, tokens = model.config, ids.numel()
    output = 2 * tokens * config.hidden_size * config.padded_vocab_size
    assert products == 2 * tokens * linear_weights(config) + output
    # Back it is the same again, but for the first layer's query_key_value.
    backward = linear_flops(config, tokens) - 2 * tokens * linear_weights(config)
    first = 2 * tokens * config.hidden_size * config.qkv_size
    assert backward == 2 * tokens * linear_weights(config) - first


def test_projection_flops_are_those_torch_counts():
    """The two trained matrices, forward and backward, once for every pack."""
    model = small_model(projection=True)
    with FlopCounterMode(display=False) as counter:
        sum(k.sum() + v.sum() for k, v in model.prefix_encoder()).backward()
    lengths, plain = [RowLength(9, 4)], replace(model.config, prefix_projection=False)
    added = step_flops(model.config, lengths, 5, packs=3) - step_flops(plain, lengths, 5, packs=3)
    assert added == 3 * counter.get_total_flops()


def test_attention_flops_count_what_is_seen():
    config, lengths = chatglm2_6b(), [RowLength(3, 1), RowLength(11, 4)]
    seen = sum(1 for n, _ in lengths for query in range(n) for key in range(-7, n) if key <= query)
    assert attention_flops(config, lengths, 7) == 2 * 2 * 32 * 128 * seen


def test_what_is_computed_again_costs_a_forward():
    config, lengths = chatglm2_6b(), [RowLength(100, 40)]
    none, mlp, layer = (step_flops(config, lengths, 128, each) for each in ("none", "mlp", "layer"))
    assert mlp - none == 28 * 2 * 100 * 4096 * 27392
    again = 28 * 2 * 100 * 4096 * (4608 + 4096 + 27392)
    assert layer - none == again + 28 * attention_flops(config, lengths, 128)
