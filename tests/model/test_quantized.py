"""The model over quantised linears, against itself with the dense weights the codes stand for."""

import contextlib
import copy

import pytest
import torch
from torch import Tensor

import glmkern
from bench.oracles import relative_error
from glmkern import ChatGLM, ChatGLMConfig, ops
from glmkern.model.computation import Computation
from glmkern.model.modules import FrozenLinear, frozen
from glmkern.model.packing import unpad
from tests.model.models import EVEN, SMALL, padded_batch, random_weights, small_model
from tests.ops.numerics import same_bits

TOLERANCE = 1e-5


LENGTHS = [7, 1, 12]


def linears(model: ChatGLM) -> dict[str, FrozenLinear]:
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, FrozenLinear) and ".layers." in name
    }


def dense_twin(model: ChatGLM) -> ChatGLM:
    """A quantised model's copy with dense weights."""
    twin = copy.deepcopy(model)
    for linear in linears(twin).values():
        qweight = ops.QuantizedWeight(linear.packed, linear.scale, linear.bits)
        linear.weight = frozen(ops.dequantize(qweight, linear.scale.dtype))
    return twin


def results(model: ChatGLM, batch: dict[str, Tensor]) -> list[Tensor]:
    """Logits, loss and the prefix's gradient."""
    prefix = model.prefix_encoder.embedding.weight
    packed, _ = unpad(**batch)
    loss = model.train().loss(packed, seed=3)
    (gradient,) = torch.autograd.grad(loss, prefix)
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    return [logits, loss.detach(), gradient]


@pytest.mark.parametrize(
    "overrides", [{}, dict(add_bias_linear=True, hidden_dropout=0.2)], ids=["usual", "bias-dropout"]
)
@pytest.mark.parametrize("recompute", ["none", "mlp", "layer"])
@pytest.mark.parametrize("bits", [4, 8])
def test_equals_the_dense_weights(bits, recompute, overrides):
    model = small_model(EVEN | overrides).quantize(bits)
    model.computation = Computation(recompute=recompute)
    batch = padded_batch(LENGTHS, model.config.padded_vocab_size, "right")
    with glmkern.backend("reference"):
        expected = results(dense_twin(model), batch)
    both = [results(model, batch), expected]
    for ours, theirs in zip(*both, strict=True):
        assert relative_error(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("bits", [4, None])
def test_a_step_has_the_same_bits_for_any_number_of_threads(threads, bits):
    model = small_model(EVEN | dict(hidden_dropout=0.2))
    if bits:
        model.quantize(bits)
    packed, _ = unpad(**padded_batch([40, 1, 60], model.config.padded_vocab_size, "right"))
    prefix = model.train().prefix_encoder.embedding.weight
    model.computation = Computation(recompute="mlp")

    def step(count):
        threads(count)
        loss = model.loss(packed, seed=3)
        return loss.detach(), *torch.autograd.grad(loss, prefix)

    first = step(1)
    for count in (2, 3):
        assert all(map(same_bits, first, step(count)))


@pytest.mark.parametrize("bits", [4, 8])
def test_generates_the_same(bits):
    model = small_model(EVEN).quantize(bits)
    prompt = torch.tensor([[3, 14, 15, 92]])
    both = [m.generate(prompt, max_length=12, do_sample=False) for m in (model, dense_twin(model))]
    assert torch.equal(*both)


def test_what_is_quantised():
    model = small_model(EVEN)
    dense = {name: linear.weight for name, linear in linears(model).items()}
    rest = {
        name: p for name, p in model.named_parameters() if name.removesuffix(".weight") not in dense
    }
    assert model.quantize(4) is model
    assert model.config.quantization_bit == 4
    assert len(dense) == 4 * model.config.num_layers
    for name, linear in linears(model).items():
        expected = ops.quantize(dense[name], 4)
        assert torch.equal(linear.packed, expected.packed)
        assert torch.equal(linear.scale, expected.scale)
    remaining = dict(model.named_parameters())
    assert remaining.keys() == rest.keys()
    assert all(remaining[name] is parameter for name, parameter in rest.items())


def test_a_quantised_layer_follows_the_models_dtype():
    model = small_model(EVEN).quantize(4).bfloat16()
    model.prefix_encoder.float()
    batch = padded_batch(LENGTHS, model.config.padded_vocab_size, "right")
    packed, _ = unpad(**batch)
    assert torch.isfinite(model.loss(packed))


@pytest.mark.parametrize("bits", [0, 2, 16, None])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits must be 4 or 8, not {bits}"):
        small_model(EVEN).quantize(bits)


def test_quantising_twice_is_refused():
    model = small_model(EVEN).quantize(8)
    with pytest.raises(ValueError, match="quantised already, to 8 bits; load the base again"):
        model.quantize(4)


def test_odd_columns_are_refused_before_anything_changes():
    model = small_model(dict(ffn_hidden_size=39))
    with pytest.raises(ValueError, match="dense_4h_to_h has 39 columns; use 8 bits"):
        model.quantize(4)
    assert all(linear.weight is not None for linear in linears(model).values())
    model.quantize(8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_output_layer_of_8_bits(dtype):
    """Logits, loss and gradient are those of the dense matrix that the codes stand for."""
    model = small_model(dtype=dtype)
    output_layer = model.transformer.output_layer
    output_layer.quantize_(8)
    twin = copy.deepcopy(model)
    dense = ops.dequantize(output_layer.matrix, torch.float32)
    twin.transformer.output_layer.weight = frozen(dense.to(dtype))
    batch = padded_batch(LENGTHS, model.config.padded_vocab_size, "right")
    # A half-precision matrix is rounded once more than codes times scale are.
    tolerance = TOLERANCE if dtype == torch.float32 else 5e-3
    for ours, theirs in zip(results(model, batch), results(twin, batch), strict=True):
        assert relative_error(ours, theirs) < tolerance


def test_an_offloaded_embedding_stays_on_the_cpu(monkeypatch):
    """The rest is on another device, on which nothing is computed; mixing the two would fail."""
    # It knows no device of that kind.
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    config = ChatGLMConfig.from_dict(SMALL)
    model = ChatGLM(config, pre_seq_len=5, offload_embedding=True)
    model.load_base(random_weights(config).items(), torch.float32, "meta")
    assert model.transformer.embedding.word_embeddings.weight.device.type == "cpu"
    assert {p.device.type for p in model.transformer.encoder.parameters()} == {"meta"}
    packed, _ = unpad(**padded_batch(LENGTHS, config.padded_vocab_size, "right"))
    loss = model.train().loss(packed)
    loss.backward()
    assert loss.device.type == model.prefix_encoder.embedding.weight.grad.device.type == "meta"
