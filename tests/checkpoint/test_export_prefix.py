"""`glmkern export` of prefixes: every format gives the same logits, and says what it lacks."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bench.oracles import diffusers_twin, relative_error, twin_forward
from glmkern import ChatGLM, cli
from glmkern.checkpoint import (
    export_glm,
    export_prefix,
    fold_prefix,
    quantize_folder,
    read_prefix,
    write_base,
    write_prefix,
)
from glmkern.checkpoint.prefix import OFFICIAL
from glmkern.errors import InputError
from glmkern.model.config import ChatGLMConfig
from glmkern.model.prefix import PrefixEncoder
from tests.model.models import SMALL, small_model

FORMATS = ("bin", "safetensors", "peft")
PROJECTED = pytest.mark.parametrize("projection", [False, True])


@pytest.fixture
def run(tmp_path):
    """run(projection): a model, its base's folder, and a checkpoint as training leaves it."""

    def make(projection=False, **overrides):
        overrides = {"ffn_hidden_size": 38, "_name_or_path": "THUDM/chatglm3-6b", **overrides}
        model = small_model(overrides, projection=projection)
        weights = {
            name: tensor for name, tensor in model.state_dict().items() if "prefix" not in name
        }
        base = replace(model.config, pre_seq_len=None, prefix_projection=False)
        checkpoint = tmp_path / "checkpoint-4"
        write_prefix(checkpoint, model.prefix_encoder.state_dict())
        model.config.save(checkpoint)
        return model, write_base(tmp_path / "base", base, weights), checkpoint

    return make


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in right)


@PROJECTED
def test_one_prefix_in_every_format_gives_the_same_logits(tmp_path, run, projection):
    model, base, checkpoint = run(projection)
    ids = torch.randint(SMALL["padded_vocab_size"], (2, 17))
    expected = model(ids).logits.detach()
    assert relative_error(expected, twin_forward(diffusers_twin(model), ids)[1].detach()) < 1e-5
    for layout in FORMATS:
        for fold in (False, True):
            target = tmp_path / f"{layout}-{fold}"
            assert (
                cli.main(
                    ["export", str(checkpoint), str(target), "--format", layout, *["--fold"] * fold]
                )
                == 0
            )
            keeps = projection and not fold and layout != "peft"
            again = ChatGLM.from_pretrained(
                base, "cpu", prefix_checkpoint=target, prefix_projection=keeps
            ).eval()
            assert (again.prefix_encoder.trans is not None) == keeps
            error = relative_error(again(ids).logits.detach(), expected)
            assert error < 1e-5 and (error == 0 or layout == "peft"), (layout, fold)


@PROJECTED
def test_a_chain_of_formats_keeps_the_bits(tmp_path, run, projection):
    model, _, checkpoint = run(projection)
    source, state = checkpoint, model.prefix_encoder.state_dict()
    for number, layout in enumerate(("safetensors", "bin", "safetensors", "bin")):
        source = export_prefix(source, tmp_path / str(number), layout).folder
        assert_same(read_prefix(source), state)
        config = ChatGLMConfig.from_pretrained(source)
        assert config == model.config
    stored = torch.load(source / "pytorch_model.bin", weights_only=True)
    assert_same(stored, {OFFICIAL + name: tensor for name, tensor in state.items()})
    assert (source / "pytorch_model.bin").read_bytes() == (
        checkpoint / "pytorch_model.bin"
    ).read_bytes()


def test_through_an_adapter_and_back(tmp_path, run):
    """Values and the second half of each key keep their bits; a second trip changes no more."""
    model, base, checkpoint = run()
    adapter = export_prefix(checkpoint, tmp_path / "adapter", "peft").folder
    back = export_prefix(adapter, tmp_path / "back", "bin", base=base).folder
    rows = (read_prefix(folder)["embedding.weight"] for folder in (checkpoint, back))
    before, after = (x.view(5, 3, 2, 2, 12) for x in rows)
    assert torch.equal(before[:, :, 1], after[:, :, 1])
    assert torch.equal(before[..., 6:], after[..., 6:])
    assert relative_error(after, before) < 2**-22
    assert ChatGLMConfig.from_pretrained(back) == model.config
    for name in ("a", "b"):
        export_prefix(adapter, tmp_path / name, "safetensors")
    assert_same(read_prefix(tmp_path / "a"), read_prefix(tmp_path / "b"))


def test_folding_is_the_encoders_own_arithmetic(run):
    model, _, _ = run(projection=True)
    state = model.prefix_encoder.state_dict()
    flat = fold_prefix(state, model.config)
    encoder = PrefixEncoder(model.config, 5)
    encoder.load_state_dict(flat)
    for ours, theirs in zip(encoder(), model.prefix(), strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    exact = {name: tensor.double() for name, tensor in state.items()}
    rows = exact["embedding.weight"] @ exact["trans.0.weight"].T + exact["trans.0.bias"]
    rows = rows.tanh() @ exact["trans.2.weight"].T + exact["trans.2.bias"]
    assert relative_error(flat["embedding.weight"].double(), rows) < 1e-6


def test_what_is_printed_and_written(tmp_path, run, capsys):
    _, base, checkpoint = run(projection=True)
    native = export_glm(base, tmp_path / "glm")
    written = {
        "bin": ({"pytorch_model.bin", "config.json"}, "official prefix of 5 tokens, 0.0"),
        "safetensors": ({"model.safetensors", "config.json"}, "prefix in safetensors of 5 tokens"),
        "peft": (
            {"adapter_config.json", "adapter_model.safetensors"},
            "PEFT adapter (keys rotated)"
            " of 5 tokens, projection folded into a flat prefix, 0.00 MB",
        ),
    }
    for layout, (names, line) in written.items():
        target = tmp_path / layout
        argv = ["export", str(checkpoint), str(target), "--format", layout, "--base", str(native)]
        assert cli.main(argv) == 0
        assert capsys.readouterr().out.startswith(f"{target}: {line}")
        assert {path.name for path in target.iterdir()} == names
        assert cli.main(argv) == 2
        assert "already holds" in capsys.readouterr().err
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(native)
    with safe_open(tmp_path / "safetensors" / "model.safetensors", "pt") as file:
        assert file.metadata()["base_family"] == "chatglm3-6b"
    # an official folder would have PEFT load the base by its remote code, so it is not named
    export_prefix(checkpoint, tmp_path / "other", "peft", base=base)
    settings = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] is None


def test_a_file_alone_needs_its_base(tmp_path, run, capsys):
    _, base, checkpoint = run(projection=True)
    file = tmp_path / "alone" / "mine.bin"
    file.parent.mkdir()
    file.write_bytes((checkpoint / "pytorch_model.bin").read_bytes())
    for flags in (["--format", "peft"], ["--format", "bin", "--fold"]):
        assert cli.main(["export", str(file), str(tmp_path / "new"), *flags]) == 2
        assert "name its base with --base" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    # without dividing its columns nothing needs to be known
    copy = export_prefix(file, tmp_path / "copy", "safetensors").folder
    assert_same(read_prefix(copy), read_prefix(file))
    assert [path.name for path in copy.iterdir()] == ["model.safetensors"]
    folded = export_prefix(file, tmp_path / "new", "bin", fold=True, base=base)
    assert folded == (tmp_path / "new", 5, True)
    assert_same(
        read_prefix(folded.folder),
        fold_prefix(read_prefix(file), ChatGLMConfig.from_pretrained(base)),
    )


def test_a_prefix_of_a_quantised_base_fits_the_native_one(tmp_path, run):
    """Its config.json says quantization_bit, which GlmForCausalLM has not and need not have."""
    _, base, checkpoint = run()
    codes = quantize_folder(base, tmp_path / "codes", 4)
    config = ChatGLMConfig.from_pretrained(codes)
    replace(config, pre_seq_len=5).save(checkpoint)
    adapter = export_prefix(checkpoint, tmp_path / "adapter", "peft").folder
    assert load_file(adapter / "adapter_model.safetensors").keys() == {"prompt_embeddings"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(num_layers=2), "has 144 columns, but this base needs 96"),
        (
            dict(_name_or_path="THUDM/chatglm2-6b"),
            "was trained on chatglm3-6b, but the base is chatgl",
        ),
    ],
)
def test_another_base(tmp_path, run, change, sentence):
    _, _, checkpoint = run()
    ChatGLMConfig.from_dict(SMALL | change).save(tmp_path / "other")
    with pytest.raises(InputError, match=sentence):
        export_prefix(checkpoint, tmp_path / "new", "bin", base=tmp_path / "other")
    assert not (tmp_path / "new").exists()


def test_an_architecture_without_a_native_form(tmp_path, run):
    _, _, checkpoint = run(rmsnorm=False)
    with pytest.raises(InputError, match="has no native form: rmsnorm is False"):
        export_prefix(checkpoint, tmp_path / "new", "peft")
    export_prefix(checkpoint, tmp_path / "new", "safetensors")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--format", "glm", "--fold"], "--fold and --base belong to prefixes"),
        (["--format", "glm", "--base", "x"], "--fold and --base belong to prefixes"),
        (["--format", "peft", "--dequantize"], "--dequantize belongs to --format glm, not to peft"),
        (["--format", "bin"], "there is no prefix checkpoint nowhere"),
        (["--format", "glm"], "there is no folder nowhere"),
        (["--format", "gguf"], "invalid choice: 'gguf'"),
        ([], "the following arguments are required: --format"),
    ],
)
def test_wrong_commands(tmp_path, flags, sentence, capsys):
    assert cli.main(["export", "nowhere", str(tmp_path / "new"), *flags]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_base_is_no_prefix_and_a_prefix_no_base(tmp_path, run):
    _, base, checkpoint = run()
    with pytest.raises(InputError, match="holds no prefix"):
        export_prefix(base, tmp_path / "new", "bin")
    with pytest.raises(InputError, match="holds only a prefix"):
        export_glm(checkpoint, tmp_path / "new")


@pytest.mark.parametrize(
    "argv", [["--help"], ["a", "b", "--format", "gguf"], ["a", "b", "--format", "glm", "--fold"]]
)
def test_help_and_mistakes_need_no_torch(argv):
    code = (
        f"import sys; from glmkern.cli import main; main(['export', *{argv!r}]); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr
