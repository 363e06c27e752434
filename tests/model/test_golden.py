"""The model against recorded outputs of the official code, float32 and half."""

import json

import pytest
import torch
from safetensors.torch import load_file

from bench.oracles import diffusers_twin, relative_error, twin_forward
from glmkern.model.computation import Computation
from glmkern.model.config import ChatGLMConfig
from glmkern.model.rotary import rotary_table
from tests.model.models import recorded_model
from tests.ops.numerics import ulp_of_max

TOLERANCE = 1e-5
PREFIX = "transformer.prefix_encoder."


@pytest.fixture(scope="module")
def record(golden):
    folder = golden / "chatglm2_tiny"

    class Record:
        cases = json.loads((folder / "cases.json").read_text())

        @staticmethod
        def read(name):
            return load_file(folder / f"{name}.safetensors")

        @staticmethod
        def model(prefix=None, dtype=torch.float32, **options):
            return recorded_model(folder, prefix, dtype, **options)

    return Record


def call(model, case):
    return model(
        case["input_ids"], case.get("attention_mask"), case.get("position_ids"), case["labels"]
    )


def check_gradients(model, case):
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            error = relative_error(parameter.grad, case[f"grad.{name}"])
            assert error < TOLERANCE, f"{name}: {error:.2e}"


def test_plain(record):
    case = record.read("plain")
    loss, logits = call(record.model(), case)
    assert relative_error(logits, case["logits"]) < TOLERANCE
    assert loss.item() == pytest.approx(record.cases["plain"]["loss"], rel=TOLERANCE)


@pytest.mark.parametrize("recompute", ["none", "mlp", "layer"])
@pytest.mark.parametrize("prefix", ["noproj", "proj"])
@pytest.mark.parametrize("layout", ["eval", "trainlayout"])
def test_prefix(record, prefix, layout, recompute):
    name = f"prefix_{prefix}_{layout}"
    case, model = record.read(name), record.model(prefix)
    model.computation = Computation(recompute=recompute)
    loss, logits = call(model, case)
    assert relative_error(logits.detach(), case["logits"]) < TOLERANCE
    assert loss.item() == pytest.approx(record.cases[name]["loss"], rel=TOLERANCE)
    loss.backward()
    check_gradients(model, case)


@pytest.mark.parametrize("name", ["leftpad", "prefix_noproj_leftpad", "prefix_proj_leftpad"])
def test_left_padding(record, name):
    """The record also labels each row's first token, which the official code then predicts from
    the padding before it; the packed model has no such rows. So the chain has two links: the twin
    reproduces the record with those labels, and the model equals the twin without them."""
    case = record.read(name)
    prefix = name.split("_")[1] if name.startswith("prefix") else None
    model = record.model(prefix)
    twin = diffusers_twin(model)
    padded = [case[k] for k in ("input_ids", "attention_mask", "position_ids")]

    their_loss, _ = twin_forward(twin, *padded, case["labels"])
    assert their_loss.item() == pytest.approx(record.cases[name]["loss"], rel=TOLERANCE)
    if prefix:
        their_loss.backward()
        for key, parameter in twin.named_parameters():
            if parameter.requires_grad:
                recorded = case[f"grad.transformer.{key}"]
                assert relative_error(parameter.grad, recorded) < TOLERANCE

    labels = case["labels"].clone()
    labels[:, 1:][case["attention_mask"][:, :-1] == 0] = -100
    twin.zero_grad()
    their_loss, _ = twin_forward(twin, *padded, labels)
    for ours in (case["labels"], labels):  # the model itself ignores the labels after padding
        model.zero_grad()
        loss, logits = model(*padded, ours)
        real = case["attention_mask"].bool()
        assert relative_error(logits[real].detach(), case["logits"][real]) < TOLERANCE
        assert (logits[~real] == 0).all()
        assert loss.item() == pytest.approx(their_loss.item(), rel=TOLERANCE)
    if prefix:
        loss.backward()
        their_loss.backward()
        theirs = dict(twin.named_parameters())
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                expected = theirs[key.removeprefix("transformer.")].grad
                assert relative_error(parameter.grad, expected) < TOLERANCE


@pytest.mark.parametrize("prefix", ["noproj", "proj"])
def test_recorded_dropout_mask(record, prefix, monkeypatch):
    """The recorded masks differ from row to row, so each row runs with its own masked prefix."""
    name = f"prefix_{prefix}_dropout"
    case, model = record.read(name), record.model(prefix)
    keep = case["keep_mask"]  # [B, P, 2L, G, C]
    labelled = (case["labels"][:, 1:] != -100).sum(1)
    total = 0
    for b in range(len(keep)):
        factors = (keep[b].transpose(0, 1) / 0.9).unbind(0)
        masked = [
            (k * factors[2 * i], v * factors[2 * i + 1])
            for i, (k, v) in enumerate(model.prefix_encoder())
        ]
        monkeypatch.setattr(model, "prefix", lambda masked=masked: masked)
        loss, logits = call(
            model,
            {
                k: v[b : b + 1]
                for k, v in case.items()
                if k in ("input_ids", "attention_mask", "position_ids", "labels")
            },
        )
        assert relative_error(logits[0].detach(), case["logits"][b]) < TOLERANCE
        total = total + loss * labelled[b] / labelled.sum()
    assert total.item() == pytest.approx(record.cases[name]["loss"], rel=TOLERANCE)
    total.backward()
    check_gradients(model, case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_as_near_to_float64_as_the_official_code(record, dtype):
    case = record.read(f"lowp_{'fp16' if dtype == torch.float16 else 'bf16'}")
    # float64 over the rounded weights is what both halves approximate.
    rounded = {k: v.to(dtype) for k, v in record.read("weights").items()}
    exact = record.model("noproj", torch.float64, weights=rounded)
    exact_loss, exact_logits = call(exact, case)
    exact_loss.backward()

    model = record.model("noproj", dtype)
    loss, logits = call(model, case)
    (loss * 1024).backward()
    gradient = model.prefix_encoder.embedding.weight.grad / 1024
    exact_gradient = exact.prefix_encoder.embedding.weight.grad
    for ours, theirs, true in (
        (logits, case["logits"], exact_logits),
        (gradient, case[f"grad.{PREFIX}embedding.weight"], exact_gradient),
    ):
        error, official = ((x.double() - true).square().mean().sqrt() for x in (ours, theirs))
        assert error <= 1.25 * official, (error, official)
    # One number is a draw: the record's own rounding to half is what it can tell apart.
    official = abs(case["loss"].double() - exact_loss)
    assert abs(loss - exact_loss) <= max(official, ulp_of_max(exact_loss, dtype) / 2)


@pytest.mark.parametrize(
    ("name", "dtype", "precision"),
    [
        ("fp32", torch.float32, "float32"),
        ("fp16", torch.float16, "model"),
        ("bf16", torch.bfloat16, "model"),
    ],
)
def test_rotary_table_at_real_size(golden, name, dtype, precision):
    recorded = load_file(golden / "rope_real.safetensors")
    table = rotary_table(ChatGLMConfig(seq_length=32768), dtype, precision)
    assert torch.equal(table[recorded["rows"]], recorded[f"cache_{name}"])


def test_rotary_table_in_float32_whatever_the_model():
    config = ChatGLMConfig(seq_length=4096)
    assert torch.equal(rotary_table(config, torch.float16), rotary_table(config, torch.float32))
    with pytest.raises(ValueError, match="rope_precision must be one of float32, model, not 'x'"):
        rotary_table(config, torch.float16, "x")
