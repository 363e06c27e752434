"""The parts of a run's memory, against those of a model."""

from dataclasses import replace

import pytest
import torch

from bench.bench_full_size import chatglm2_6b
from glmkern.checkpoint.base import MAPPED_BYTES
from glmkern.model.computation import Computation
from glmkern.model.packing import pack_rows
from glmkern.plan.machines import PROCESS
from glmkern.plan.memory import base_bytes, prefix_parameters, saved_bytes
from glmkern.plan.precision import Precision
from glmkern.plan.prediction import predict
from glmkern.plan.work import RowLength
from tests.model.models import small_model
from tests.plan.jobs import job, machine, random_rows


@pytest.mark.parametrize("output_layer_bit", [0, 8])
@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("rope", ["float32", "model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_base_bytes_are_those_of_a_model(dtype, rope, bits, output_layer_bit):
    changes = {"ffn_hidden_size": 38, "torch_dtype": "float16"}
    model = small_model(changes, pre_seq_len=None, dtype=dtype)
    if bits:
        model.quantize(bits)
    if output_layer_bit:
        model.transformer.output_layer.quantize_(output_layer_bit)
    precision = Precision.of(model.config, dtype, torch.device("cpu"), rope)
    model.cos_sin = model.cos_sin.to(getattr(torch, precision.rope))
    tensors = [*model.parameters(), *model.buffers()]
    stored = replace(
        precision,
        weights=str(dtype).removeprefix("torch."),
        scales=str(dtype).removeprefix("torch."),
    )  # not loaded from a folder
    total = sum(each.nbytes for each in tensors)
    assert base_bytes(model.config, stored, output_layer_bit) == total
    embedding = model.transformer.embedding.word_embeddings.weight.nbytes
    assert base_bytes(model.config, stored, output_layer_bit, True) == total - embedding


@pytest.mark.parametrize("projection", [False, True])
def test_prefix_parameters(projection):
    model = small_model(projection=projection)
    assert prefix_parameters(model.config, 5) == sum(
        p.numel() for p in model.prefix_encoder.parameters()
    )


@pytest.mark.parametrize("recompute", ["none", "mlp", "layer"])
def test_saved_bytes_are_what_autograd_keeps(recompute):
    model = small_model({"num_layers": 6}).train()
    model.computation = Computation(recompute=recompute)
    made = random_rows(4, 40, model.config.padded_vocab_size)
    weights = {p.data_ptr() for p in [*model.parameters(), model.cos_sin]}
    kept = {}

    def keep(x):
        if x.data_ptr() not in weights and x.numel() >= len(batch.input_ids):
            kept[x.data_ptr()] = x
        return x

    batch = pack_rows(made)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model.loss(batch)
    segments = {x.untyped_storage().data_ptr() for x in kept.values() if x.shape[0] == 5}
    measured = sum(
        x.nbytes for x in kept.values() if x.untyped_storage().data_ptr() not in segments
    )
    pack = RowLength(len(batch.input_ids), int((batch.labels >= 0).sum()))
    assert saved_bytes(model.config, pack, "float32", recompute) == pytest.approx(
        measured, rel=0.03
    )
    assert loss.requires_grad


def test_reading_may_take_more_than_training():
    """A wide base and one short row: pages of the files, and no optimiser yet."""
    planned = job(chatglm2_6b(), [(10, 3)], Precision("float32", "float16"))
    predicted = predict(planned, machine())
    base = base_bytes(planned.config, planned.precision)
    assert predicted.total == PROCESS + base + MAPPED_BYTES + 2 * 65024 * 4096
    assert predicted.total > sum(predicted.memory.values())
    assert "while the base is read" in "\n".join(predicted.table())
    on_gpu = predict(planned, machine(device="cuda"))
    assert on_gpu.total == sum(on_gpu.memory.values())
