"""The GPU's training step benchmark, on the CPU: all sides do the same work."""

from unittest import mock

import pytest
import torch

from bench import bench_step
from bench.train_models import OFFICIAL, OURS, check_equal_work
from glmkern import ChatGLMConfig
from glmkern.model.packing import IGNORE_INDEX
from tests.model.models import SMALL

NAMES = (OURS, bench_step.ROW_BY_ROW, bench_step.DEQUANTISED, OFFICIAL)
LENGTHS = ((3, 4), (0, 6), (1, 2))


@pytest.fixture
def model():
    config = ChatGLMConfig.from_dict(SMALL | dict(ffn_hidden_size=38, seq_length=256))
    return bench_step.make_model(config, torch.float32, "cpu")


def test_equal_work(model):
    steps = bench_step.make_steps(model, LENGTHS, NAMES)
    check_equal_work(steps)
    before = steps[OURS].gradient().clone()
    with torch.no_grad():
        model.prefix_encoder.embedding.weight[0, 0] += 1.0
    check_equal_work(steps)
    assert not torch.allclose(steps[OURS].gradient(), before, rtol=0.01)


def test_work_that_is_not_a_number_is_not_equal(model):
    steps = bench_step.make_steps(model, LENGTHS, (OURS, OFFICIAL))
    with torch.no_grad():
        model.prefix_encoder.embedding.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="does other work than glmkern"):
        check_equal_work(steps)


def test_products_of_each_scheme(model):
    """Ours: forward and back. Official: forward, again but for a block's last linear, and back. The
    first layer's query_key_value needs no gradient of its input."""
    layers = len(model.transformer.encoder.layers)
    steps = bench_step.make_steps(model, LENGTHS, (bench_step.DEQUANTISED, OFFICIAL))
    dense, made = bench_step.DequantizedLinear.dense, []
    with mock.patch.object(
        bench_step.DequantizedLinear,
        "dense",
        lambda self, dtype: made.append(self) or dense(self, dtype),
    ):
        steps[bench_step.DEQUANTISED].run()
        assert len(made) == (4 + 4) * layers - 1
        made.clear()
        steps[OFFICIAL].run()
    assert len(made) == len(LENGTHS) * ((4 + 3 + 4) * layers - 1)
    for linear in set(made[1:]) - {made[0]}:
        assert linear.weight_gradient.shape == linear.dense(torch.float32).shape


def test_padding(model):
    (row,) = bench_step.make_rows(((2, 3),), vocabulary=50)
    padded = bench_step.padded_row(row)
    assert len(padded.input_ids) == len(padded.labels) == 193
    assert padded.labels[:5] == row.labels
    assert set(padded.labels[5:]) == {IGNORE_INDEX}


def test_says_so_without_a_gpu():
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: False),
        mock.patch("sys.argv", ["bench_step"]),
        pytest.raises(SystemExit, match="needs a GPU, and torch sees none"),
    ):
        bench_step.main()
