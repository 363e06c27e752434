"""The training step's benchmark: all sides do the same, and its flops are counted right."""

import re
import statistics

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import bench_train, train_models
from bench.train_models import ADVERTISEGEN_ROWS, OFFICIAL, OURS, WORKLOADS, Workload
from glmkern import ChatGLMConfig
from glmkern.model.computation import Computation
from glmkern.model.modules import FrozenLinear
from glmkern.model.packing import IGNORE_INDEX
from glmkern.plan.work import linear_flops
from glmkern.tokenizer import ChatGLMTokenizer
from glmkern.training.data.examples import read_examples
from glmkern.training.data.rows import build_training_rows
from tests.model.models import small_model

LENGTHS = {
    "float32": ((0, 11),) * 3,
    "int4": ((0, 11),) * 3,
    "AdvertiseGen": ((3, 4), (5, 6), (1, 2)),
}


@pytest.fixture
def model():
    # 4 bits pack two columns in a byte, so no width is odd.
    model = small_model(dict(kv_channels=16, ffn_hidden_size=38, seq_length=256), pre_seq_len=7)
    model.computation = Computation(prefix_dropout=0.0)
    return model.train()


def steps(model, name):
    workload = Workload(LENGTHS[name], WORKLOADS[name].steps)
    return {each: workload.make_step(each, model) for each in workload.steps}


@pytest.mark.parametrize("name", WORKLOADS)
def test_equal_work(model, name):
    train_models.check_equal_work(steps(model, name))


def test_unequal_work_is_refused(model):
    unequal = steps(model, "float32")
    with torch.no_grad():
        model.prefix_encoder.embedding.weight[0, 0] += 0.1
    with pytest.raises(RuntimeError, match="does other work than glmkern"):
        train_models.check_equal_work(unequal)


def test_linear_flops(model, monkeypatch):
    """Torch counts the same products in our step, made by torch; those of ops are not visible."""
    monkeypatch.setattr(FrozenLinear, "_weight_for_torch", lambda self, x: self.weight)
    with FlopCounterMode(display=False) as counter:
        steps(model, "float32")[OURS].run()
    assert counter.get_total_flops() == linear_flops(model.config, tokens=33)


def products(step, weights: set[tuple[int, int]]) -> int:
    """Flops of a step's products of 33 rows with a linear's weight, or of its gradient."""
    counted = 0

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal counted
            if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                a, b = args[-2:]
                sizes = {(*a.shape, b.shape[1])}
                for rows, columns in weights:
                    if sizes & {(33, columns, rows), (33, rows, columns), (rows, 33, columns)}:
                        counted += 2 * 33 * rows * columns
                        break
            return function(*args, **(kwargs or {}))

    with Counter():
        step.run()
    return counted


@pytest.mark.parametrize(
    "implementation, units",
    [("lean dequantise + sgemm", 2), (f"{OFFICIAL}, no checkpointing", 3), (OFFICIAL, 4)],
)
def test_the_int4_schemes_do_their_number_of_products(model, implementation, units):
    """A unit is one product of every linear; the lean scheme has none below layer 0's attention."""
    config = model.config
    shapes = {
        (config.qkv_size, config.hidden_size),
        (config.hidden_size, config.query_size),
        (2 * config.ffn_hidden_size, config.hidden_size),
        (config.hidden_size, config.ffn_hidden_size),
    }
    unit = 2 * 33 * bench_train.linear_weights(config)
    skipped = 2 * 33 * config.qkv_size * config.hidden_size if units == 2 else 0
    assert products(steps(model, "int4")[implementation], shapes) == units * unit - skipped


def test_flops_of_a_layer_by_hand():
    """One layer, one head of 4 channels: 4 weights a linear row or column."""
    config = ChatGLMConfig(
        num_layers=1,
        padded_vocab_size=10,
        hidden_size=4,
        ffn_hidden_size=4,
        kv_channels=4,
        num_attention_heads=1,
        multi_query_attention=True,
    )
    tokens, predicted = 5 + 3, 3 + 2  # the second row's first token has nothing before it
    weights = 12 * 4 + 4 * 4 + 8 * 4 + 4 * 4
    scores = 5 * 6 // 2 + 3 * 4 // 2 + 8 * 128
    expected = (
        2 * tokens * weights
        + 2 * tokens * (weights - 12 * 4)
        + 2 * 2 * predicted * 4 * 10
        + 4 * 4 * scores
        + 10 * 4 * scores
    )
    assert bench_train.flops(config, ((2, 3), (0, 3))) == expected


def test_padded_rows():
    rows = train_models.make_rows(((2, 1), (1, 4)), vocabulary=50)
    ids, labels = train_models.padded(rows, 6)
    assert ids[0].tolist() == rows[0].input_ids + [0] * 3
    assert labels[0].tolist() == [IGNORE_INDEX] * 2 + rows[0].input_ids[2:] + [IGNORE_INDEX] * 3
    assert train_models.padded(rows, None)[0].shape == (2, 5)


def test_advertisegen_rows_are_typical(shared):
    """Four neighbours of the real rows, near the means of all such batches."""
    tokenizer = ChatGLMTokenizer.from_pretrained(shared / "data/tokenizer")
    examples = read_examples(shared / "data/advertisegen/train.json", "content", "summary")
    rows = build_training_rows(
        examples, tokenizer, max_source_length=64, max_target_length=128
    ).rows
    prompts = [row.labels.count(IGNORE_INDEX) for row in rows]
    lengths = [
        (prompt, len(row.labels) - prompt) for prompt, row in zip(prompts, rows, strict=True)
    ]
    batches = [tuple(lengths[i : i + 4]) for i in range(0, len(lengths) - 3, 4)]
    assert ADVERTISEGEN_ROWS in batches
    for measure in (
        lambda batch: sum(map(sum, batch)),
        lambda batch: max(map(sum, batch)),
        lambda batch: sum(prompt for prompt, _ in batch),
    ):
        assert measure(ADVERTISEGEN_ROWS) == pytest.approx(
            statistics.mean(map(measure, batches)), rel=0.03
        )


def test_profile_names_every_op(model):
    table = bench_train.profile(model, "int4", steps=1)
    for op in (
        "quant_linear_fwd",
        "quant_linear_bwd",
        "prefix_attention_fwd",
        "prefix_attention_bwd",
        "swiglu_fwd",
        "rope_fwd",
        "add_rms_norm_fwd",
        "linear_cross_entropy_fwd",
    ):
        assert re.search(rf"^glmkern::\w*{op} ", table, re.MULTILINE), op


def test_checks_by_hand(monkeypatch):
    """The rate is what the official row's flops, time and fraction say; 3 bytes a weight saved."""
    config = ChatGLMConfig(
        num_layers=1,
        padded_vocab_size=10,
        hidden_size=4,
        ffn_hidden_size=4,
        kv_channels=4,
        num_attention_heads=1,
        multi_query_attention=True,
    )
    work = bench_train.flops(config, train_models.FULL_ROWS)
    weights = bench_train.linear_weights(config)
    rows = [
        {
            "name": name,
            "implementation": each,
            "median_ms": 1e3 if each == OURS else 2e3,
            "fraction": 0.5,
        }
        for name, workload in WORKLOADS.items()
        for each in workload.steps
    ]
    memory = [
        {"implementation": f"{name}: {OURS}", "peak_mib": mib * weights / 2**20}
        for name, mib in (("float32", 4), ("int4", 1))
    ]
    monkeypatch.setattr(bench_train, "OFFICIAL_GEMM_RATE", work * 2)
    text = bench_train.checks({"rows": rows, "memory": memory}, config)
    # The row's rate is work / (2 s * 0.5): half of the rate at which 3.34 s were measured.
    assert "2.00 s a step" in text and "0.30 of the 6.68 s" in text
    assert "int4 saves 3.00 bytes a linear weight" in text
    assert "int4: 2.00x as fast as official scheme\n" in text
    assert text.count("2.00x as fast as") == 7
