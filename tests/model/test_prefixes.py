"""Several prefixes over one base, one of them in use."""

import json
from dataclasses import replace

import pytest
import torch

from glmkern.checkpoint import write_prefix
from glmkern.checkpoint.adapter import write_adapter
from glmkern.errors import InputError
from glmkern.model.prefix import PrefixEncoder
from tests.model.models import small_model


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
