"""The public model: read from a folder, and with several prefixes over one base."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from glmkern.chatglm import ChatGLM
from glmkern.checkpoint import quantize_folder, write_base, write_prefix
from glmkern.checkpoint.adapter import write_adapter
from glmkern.errors import InputError
from glmkern.model.packing import pack_rows
from glmkern.model.prefix import PrefixEncoder
from tests.model.models import random_rows, small_model


@pytest.fixture
def folder(tmp_path):
    model = small_model()
    state = {k: v for k, v in model.state_dict().items() if "prefix_encoder" not in k}
    write_base(tmp_path / "base", model.config, state)
    write_prefix(tmp_path, model.prefix_encoder.state_dict())
    return tmp_path, model


def test_from_pretrained(folder):
    path, model = folder
    batch = pack_rows(random_rows([6, 2]))
    again = ChatGLM.from_pretrained(path / "base", prefix_checkpoint=path).eval()
    assert again.dtype == torch.float32
    assert again.loss(batch) == model.loss(batch)
    half = ChatGLM.from_pretrained(
        path / "base",
        dtype=torch.float16,
        pre_seq_len=5,
        prefix_checkpoint=path / "pytorch_model.bin",
    ).eval()
    assert half.prefix_encoder.embedding.weight.dtype == torch.float32
    assert half.loss(batch).item() == pytest.approx(model.loss(batch).item(), rel=1e-2)


def test_a_folder_that_holds_its_own_prefix(tmp_path):
    """As a full checkpoint of the official code: config.json says pre_seq_len."""
    model, rows = small_model(), pack_rows(random_rows([6, 2]))
    model.config.save(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = ChatGLM.from_pretrained(tmp_path).eval()
    assert again.loss(rows) == model.loss(rows)
    quantize_folder(tmp_path, tmp_path / "base", 8)
    assert ChatGLM.from_pretrained(tmp_path / "base").prefix_encoder is None
    save_file(
        {k: v for k, v in model.state_dict().items() if "prefix" not in k},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(InputError, match="holds no prefix"):
        ChatGLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=str)
def test_half_weights_stay_as_they_are_on_a_cpu(tmp_path, stored):
    """The same results as from float32 copies of them, without the copies."""
    model = small_model(pre_seq_len=None)
    state = {name: weight.to(stored) for name, weight in model.state_dict().items()}
    write_base(tmp_path, model.config, state)
    kept = ChatGLM.from_pretrained(tmp_path, "cpu", pre_seq_len=5).eval()
    copied = ChatGLM(kept.config, pre_seq_len=5).eval()
    copied.load_base(
        ((name, weight.float()) for name, weight in state.items()), torch.float32, "cpu"
    )
    copied.prefix_encoder.load_state_dict(kept.prefix_encoder.state_dict())
    dtypes = {name: p.dtype for name, p in kept.named_parameters()}
    assert kept.dtype == torch.float32
    assert {dtypes[name] for name in state if "norm" not in name and "bias" not in name} == {stored}
    assert {dtypes[name] for name in dtypes if "norm" in name or "bias" in name} == {torch.float32}

    batch, ids = pack_rows(random_rows([6, 2])), torch.tensor([[3, 14, 15]])
    results = []
    for each in (kept, copied):
        loss = each.loss(batch)
        (gradient,) = torch.autograd.grad(loss, each.prefix_encoder.embedding.weight)
        results.append(
            (each(ids).logits, loss, gradient, each.generate(ids, max_length=9, do_sample=False))
        )
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(results[0][-1], results[1][-1])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(pre_seq_len=6), "holds 5 virtual tokens, but pre_seq_len is 6"),
        (dict(prefix_projection=True), "was trained without prefix_projection"),
    ],
)
def test_prefix_must_fit(folder, arguments, sentence):
    path, _ = folder
    with pytest.raises(InputError, match=sentence):
        ChatGLM.from_pretrained(path / "base", prefix_checkpoint=path, **arguments)


def test_unsupported_loads(folder):
    path, _ = folder
    with pytest.raises(InputError, match="4 or 8 bits, not 5"):
        ChatGLM.from_pretrained(path / "base", quantization_bit=5)
    with pytest.raises(ValueError, match="pre_seq_len is 0; it must be a positive"):
        ChatGLM.from_pretrained(path / "base", pre_seq_len=0)


def test_float32_residual_needs_float32_weights(tmp_path):
    model = small_model(dict(fp32_residual_connection=True), pre_seq_len=None)
    write_base(tmp_path, model.config, model.state_dict())
    with pytest.raises(ValueError, match="fp32_residual_connection is True"):
        ChatGLM.from_pretrained(tmp_path, dtype=torch.float16)


def test_prefixes_by_name(tmp_path):
    model = small_model(pre_seq_len=5)
    prompt = torch.randint(151, (1, 4))

    def text():
        return model.generate(prompt, max_length=60).tolist()

    texts = {"default": text()}
    for name, length, projection in (("law", 3, False), ("ads", 9, True)):
        encoder = PrefixEncoder(model.config, length, projection)
        write_prefix(tmp_path / name, encoder.state_dict())
        alone = small_model(pre_seq_len=length, projection=projection)
        alone.load_state_dict(
            {k: v for k, v in model.state_dict().items() if "prefix" not in k},
            strict=False,
            assign=True,
        )
        alone.prefix_encoder.load_state_dict(encoder.state_dict())
        texts[name] = alone.generate(prompt, max_length=60).tolist()
        model.load_prefix(tmp_path / name, name)
        assert model.prefix_name == "default"  # loading changes nothing
    assert model.prefix_names == ["default", "law", "ads"]
    plain = small_model(pre_seq_len=None)
    plain.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "prefix" not in k}, assign=True
    )
    texts[None] = plain.generate(prompt, max_length=60).tolist()
    assert len({json.dumps(each) for each in texts.values()}) == 4

    for name in ("ads", None, "law", "default", "ads"):
        model.use_prefix(name)
        assert model.prefix_name == name and text() == texts[name]
        keys = {key for key in model.state_dict() if "prefix_encoder" in key}
        trained = {key for key, each in model.named_parameters() if each.requires_grad}
        assert keys == trained
        assert len(keys) == {"ads": 5, None: 0}.get(name, 1)
        assert model.config.pre_seq_len == {"default": 5, "law": 3, "ads": 9, None: None}[name]
        assert model.config.prefix_projection == (name == "ads")
    # A new prefix of the name that is in use is in use.
    model.load_prefix(tmp_path / "law", "ads")
    assert model.prefix_name == "ads" and text() == texts["law"]


def test_prefixes_that_are_not_there(tmp_path):
    model = small_model()
    with pytest.raises(InputError, match="no prefix 'law'; loaded: default"):
        model.use_prefix("law")
    with pytest.raises(InputError, match="no prefix 'law'; loaded: none"):
        small_model(pre_seq_len=None).use_prefix("law")
    write_prefix(tmp_path, {"embedding.weight": torch.zeros(4, 7)})
    with pytest.raises(InputError, match="has 7 columns, but this base needs"):
        model.load_prefix(tmp_path, "law")
    assert model.prefix_names == ["default"]


def test_any_format_and_its_family(tmp_path):
    """An adapter's keys are rotated back; a prefix of another member of the family is refused."""
    model = small_model()
    model.config = replace(model.config, extra={"_name_or_path": "THUDM/chatglm2-6b"})
    rows = torch.randn(4, model.config.kv_size)
    write_adapter(tmp_path / "adapter", rows, model.config)
    model.load_prefix(tmp_path / "adapter", "law")
    model.use_prefix("law")
    torch.testing.assert_close(model.prefix_encoder.embedding.weight.detach(), rows)
    write_prefix(tmp_path / "other", {"embedding.weight": rows}, "safetensors", "chatglm3-6b")
    with pytest.raises(InputError, match="was trained on chatglm3-6b, but the base is chatglm2-6b"):
        model.load_prefix(tmp_path / "other", "ads")
    assert model.prefix_names == ["default", "law"]
