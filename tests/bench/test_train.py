"""The training step's benchmark: both sides do the same, and its flops are counted right."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import bench_train
from glmkern import ChatGLMConfig
from tests.model.oracles import small_model


@pytest.fixture
def model():
    model = small_model(dict(kv_channels=16), pre_seq_len=7)
    model.prefix_dropout = 0.0
    return model.train()


@pytest.fixture
def steps(model):
    ids = torch.randint(model.config.padded_vocab_size, (3, 11))
    return {name: bench_train.make_step(name, model, ids)
            for name in (bench_train.OURS, *bench_train.PEERS)}


def test_equal_work(steps):
    bench_train.check_equal_work(steps)


def test_unequal_work_is_refused(model, steps):
    with torch.no_grad():
        model.prefix_encoder.embedding.weight[0, 0] += 0.1
    with pytest.raises(RuntimeError, match="does other work than glmkern"):
        bench_train.check_equal_work(steps)


def test_linear_flops(model, steps):
    """Torch counts the same products in our step; the ops' own are not visible to it."""
    with FlopCounterMode(display=False) as counter:
        steps[bench_train.OURS].run()
    assert counter.get_total_flops() == bench_train.linear_flops(model.config, tokens=33)


def test_flops_of_a_layer_by_hand():
    """One layer, one head of 4 channels: 4 weights a linear row or column."""
    config = ChatGLMConfig(num_layers=1, padded_vocab_size=10, hidden_size=4, ffn_hidden_size=4,
                           kv_channels=4, num_attention_heads=1, multi_query_attention=True)
    tokens, labelled = 4 * 128, 4 * 127
    weights = 12 * 4 + 4 * 4 + 8 * 4 + 4 * 4
    scores = 4 * (128 * 129 // 2 + 128 * 128)
    expected = 2 * tokens * weights + 2 * tokens * (weights - 12 * 4) \
        + 2 * 2 * labelled * 4 * 10 + 4 * 4 * scores + 10 * 4 * scores
    assert bench_train.flops(config) == expected
