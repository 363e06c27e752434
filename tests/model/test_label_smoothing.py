"""The smoothed loss and its gradient against transformers' LabelSmoother."""

import pytest
import torch
from transformers.trainer_pt_utils import LabelSmoother

from bench.oracles import diffusers_twin, relative_error, twin_forward
from glmkern.model.computation import Computation
from glmkern.model.packing import pack_rows
from glmkern.training.data.rows import Row
from tests.model.models import padded_batch, small_model


@pytest.mark.parametrize("epsilon", [0.1, 0.7])
@pytest.mark.parametrize("micro_batches", [[[0, 1, 2]], [[0, 2], [1]]])
def test_loss_and_gradient_are_those_of_transformers(epsilon, micro_batches):
    """Packed, with the weights of micro-batches; there padded, a micro-batch at a time."""
    model = small_model()
    twin = diffusers_twin(model)
    model.computation = Computation(label_smoothing=epsilon)
    batch = padded_batch([7, 4, 12], 151, "right")
    smoother = LabelSmoother(epsilon)
    expected = 0
    for rows in micro_batches:
        labels = batch["labels"][rows]
        _, logits = twin_forward(twin, batch["input_ids"][rows])
        expected = expected + smoother({"logits": logits}, labels, shift_labels=True)
    expected.backward()

    lengths = batch["attention_mask"].sum(1).tolist()
    rows = [
        Row(ids[:n].tolist(), labels[:n].tolist())
        for n, ids, labels in zip(lengths, batch["input_ids"], batch["labels"], strict=True)
    ]
    weights = [0.0] * 3
    for members in micro_batches:
        labelled = sum(label != -100 for row in members for label in rows[row].labels[1:])
        for row in members:
            weights[row] = 1 / labelled
    loss = model.loss(pack_rows(rows, token_weight_per_row=weights))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (
        relative_error(
            model.prefix_encoder.embedding.weight.grad, twin.prefix_encoder.embedding.weight.grad
        )
        < 1e-5
    )
    if len(micro_batches) == 1:  # without weights the mean over all labelled tokens
        assert model.loss(pack_rows(rows)).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = small_model(dtype=dtype)
    rows = [Row([1, 2, 3, 4], [-100, 2, 3, 4])]
    plain = model.loss(pack_rows(rows))
    model.computation = Computation(label_smoothing=0.3)
    smoothed = model.loss(pack_rows(rows))
    assert smoothed.dtype == plain.dtype
    logits = model(torch.tensor([[1, 2, 3, 4]])).logits.to(torch.float64)
    # LabelSmoother sums in float32; in full the definition is this.
    logs = logits[0, :3].log_softmax(-1)
    expected = -(0.7 * logs[range(3), [2, 3, 4]] + 0.3 * logs.mean(-1)).mean()
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    assert smoothed.item() == pytest.approx(expected.item(), rel=tolerance)
