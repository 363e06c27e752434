"""Bases in 4 and 8 bits: quantised while read, written, read back, and refused in one sentence."""

from dataclasses import replace

import pytest
import torch

from glmkern import ChatGLM, cli, ops
from glmkern.checkpoint import (
    expected_shapes,
    quantize_folder,
    quantize_stream,
    read_base,
    write_base,
)
from glmkern.errors import InputError
from glmkern.model.config import ChatGLMConfig
from tests.checkpoint.conftest import LAYOUTS

QKV = "transformer.encoder.layers.1.self_attention.query_key_value.weight"
BITS = pytest.mark.parametrize("bits", [4, 8])


@pytest.fixture
def config(config) -> ChatGLMConfig:
    return replace(config, ffn_hidden_size=14, torch_dtype="float16")


@pytest.fixture
def half(state) -> dict[str, torch.Tensor]:
    return {name: tensor.half() for name, tensor in state.items()}


@pytest.fixture
def codes(half):
    """codes(bits): the state as an official quantised base has it."""

    def quantized(bits: int) -> dict[str, torch.Tensor]:
        return dict(quantize_stream(half.items(), bits))

    return quantized


def quantized(config: ChatGLMConfig, bits: int) -> ChatGLMConfig:
    return replace(config, quantization_bit=bits)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert left[name].dtype == tensor.dtype, name
        assert torch.equal(left[name], tensor), name


@BITS
def test_only_the_layers_linears_are_quantised(half, codes, config, bits):
    state = codes(bits)
    assert state.keys() == expected_shapes(config, bits).keys()
    linears = [name for name in half if f"{name}_scale" in state]
    assert len(linears) == 4 * config.num_layers
    for name in linears:
        packed, scale, _ = ops.quantize(half[name], bits)
        assert torch.equal(state[name], packed)
        assert torch.equal(state[f"{name}_scale"], scale)
    for name in half.keys() - set(linears):
        assert state[name] is half[name]


@BITS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_every_layout(store, codes, config, layout, bits):
    config = quantized(config, bits)
    # the fixture `store` saves the configuration it was given
    folder = store(codes(bits), layout)
    config.save(folder)
    assert_same(dict(read_base(folder, config)), codes(bits))


@BITS
@pytest.mark.parametrize("layout", ["safetensors", "bin"])
@pytest.mark.parametrize("limit", [3_000, 10**9])
def test_quantise_save_load_and_save_again(
    tmp_path, store, half, codes, config, bits, layout, limit, monkeypatch
):
    """The same bits all the way, whether a folder or a model is quantised."""
    source = store(half, "sharded_bin")
    (source / "tokenizer.model").write_bytes(b"a tokenizer")
    (source / "modeling_chatglm.py").write_text("raise SystemExit")
    monkeypatch.setattr(write_base, "__defaults__", (limit, "safetensors", ()))
    first = quantize_folder(source, tmp_path / "first", bits, layout)
    stored = ChatGLMConfig.from_pretrained(first)
    assert stored == quantized(config, bits)
    assert_same(dict(read_base(first, stored)), codes(bits))
    suffixes = {path.suffix for path in first.iterdir()} - {".json", ".model", ".py"}
    assert suffixes == {f".{layout}"}
    assert (first / "tokenizer.model").read_bytes() == b"a tokenizer"
    assert len(list(first.glob(f"*.{layout}"))) == 1 or limit == 3_000

    second = write_base(tmp_path / "second", stored, read_base(first, stored), layout="bin")
    assert_same(dict(read_base(second, stored)), codes(bits))


@BITS
def test_a_model_from_either_folder_is_the_same(tmp_path, store, half, config, bits):
    source = store(half)
    target = quantize_folder(source, tmp_path / "codes", bits)
    ids = torch.randint(config.padded_vocab_size, (2, 9))
    models = [
        ChatGLM.from_pretrained(source, "cpu").quantize(bits),  # from float32 weights
        ChatGLM.from_pretrained(source, "cpu", quantization_bit=bits),
        ChatGLM.from_pretrained(target, "cpu"),
        ChatGLM.from_pretrained(target, "cpu", quantization_bit=bits),
    ]
    logits = [model.eval()(ids).logits for model in models]
    assert all(model.config.quantization_bit == bits for model in models)
    assert all(torch.equal(other, logits[1]) for other in logits[2:])
    linear = models[2].get_submodule(QKV.removesuffix(".weight"))
    assert linear.scale.dtype == torch.float16 and linear.bits == bits and linear.weight is None


@BITS
def test_equals_the_dequantised_dense_model(store, half, codes, config, bits):
    """Logits, loss and prefix gradient in float32."""
    model = ChatGLM.from_pretrained(store(half), "cpu", quantization_bit=bits, pre_seq_len=5)
    dense = ChatGLM(config, pre_seq_len=5)
    state = codes(bits)
    weights = {
        name: tensor
        if tensor.dtype != torch.int8
        else ops.dequantize(
            ops.QuantizedWeight(tensor, state[f"{name}_scale"], bits), torch.float32
        )
        for name, tensor in state.items()
        if not name.endswith("_scale")
    }
    dense.load_base(weights.items(), torch.float32, "cpu")
    dense.prefix_encoder.load_state_dict(model.prefix_encoder.state_dict())
    ids = torch.randint(config.padded_vocab_size, (2, 9))
    results = []
    for each in (model.eval(), dense.eval()):
        output = each(ids, labels=ids)
        (gradient,) = torch.autograd.grad(output.loss, each.prefix_encoder.embedding.weight)
        results.append((output.logits, output.loss, gradient))
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_the_command(tmp_path, store, half, codes, config, capsys):
    source = store(half)
    assert cli.main(["quantize", str(source), str(tmp_path / "new"), "--bits", "4"]) == 0
    assert "4 bits" in capsys.readouterr().out
    assert_same(dict(read_base(tmp_path / "new", quantized(config, 4))), codes(4))
    assert cli.main(["quantize", str(source), str(tmp_path / "new"), "--bits", "4"]) == 2
    assert "already holds config.json; choose a new folder" in capsys.readouterr().err
    assert cli.main(["quantize", str(source), str(tmp_path / "other"), "--bits", "3"]) == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("stored", "asked", "sentence"),
    [
        (4, 8, "is quantised to 4 bits already; use the fp16 folder to have it in 8 bits"),
        (0, 3, "a base can be quantised to 4 or 8 bits, not 3"),
    ],
)
def test_bits_that_cannot_be_had(store, codes, half, config, stored, asked, sentence):
    folder = store(codes(stored) if stored else half)
    quantized(config, stored).save(folder)
    with pytest.raises(InputError, match=sentence):
        ChatGLM.from_pretrained(folder, "cpu", quantization_bit=asked)


def test_quantised_twice(tmp_path, store, codes, config):
    folder = store(codes(4))
    quantized(config, 4).save(folder)
    with pytest.raises(InputError, match="is quantised to 4 bits already; copy it as it is"):
        quantize_folder(folder, tmp_path / "new", 4)


def test_odd_columns(tmp_path, store, half, config):
    odd = replace(config, ffn_hidden_size=15)
    folder = store(half)
    odd.save(folder)
    with pytest.raises(InputError, match="have 15 columns; use 8 bits"):
        quantize_folder(folder, tmp_path / "new", 4)


@pytest.mark.parametrize(
    ("said", "held", "sentence"),
    [
        (0, 4, "holds scales|is int8, but config.json does not say quantization_bit; set it there"),
        (4, 0, r"says quantization_bit 4, but .*query_key_value.weight in .* is float16, not int8"),
        (
            8,
            4,
            r"says quantization_bit 8, but .* has the shape of 4-bit codes, \[96, 10\]; correct",
        ),
        (
            4,
            8,
            r"says quantization_bit 4, but .* has the shape of 8-bit codes, \[96, 20\]; correct",
        ),
    ],
)
def test_a_configuration_that_does_not_fit(store, codes, half, config, said, held, sentence):
    folder = store(codes(held) if held else half)
    config = quantized(config, said)
    config.save(folder)
    with pytest.raises(InputError, match=sentence):
        read_base(folder, config)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (float("nan"), "holds NaN or infinite values"),
        (float("inf"), "holds NaN or infinite values"),
        (-0.5, r"holds a negative scale \(-0.5\)"),
    ],
)
def test_broken_scales(tmp_path, store, codes, config, value, sentence):
    state = codes(4)
    state[f"{QKV}_scale"][3] = value
    folder = store(state)
    config = quantized(config, 4)
    config.save(folder)
    with pytest.raises(InputError, match=f"{QKV}_scale in .* {sentence}"):
        ChatGLM.from_pretrained(folder, "cpu")
    with pytest.raises(InputError, match=sentence):
        write_base(tmp_path / "new", config, read_base(folder, config))
    assert not (tmp_path / "new").exists()


def test_missing_scale(store, codes, config):
    state = codes(4)
    del state[f"{QKV}_scale"]
    folder = store(state)
    quantized(config, 4).save(folder)
    with pytest.raises(InputError, match=rf"lack {QKV}_scale, which config.json asks for"):
        read_base(folder, config)


def test_bin_beside_safetensors_is_refused(tmp_path, config, half):
    write_base(tmp_path, config, half)
    with pytest.raises(InputError, match="holds safetensors, which would be read in place"):
        write_base(tmp_path, config, half, layout="bin")
