"""A tokenizer's files: which family they are of, written again, and broken."""

import json
import shutil
import subprocess
import sys

import pytest

from glmkern.errors import InputError
from glmkern.tokenizer import ChatGLMTokenizer
from tests.tokenizer.conftest import FAMILIES, train_pieces


@pytest.mark.parametrize(
    ("config", "vocab_size"),
    [
        (None, 64794),
        ({"name_or_path": "THUDM/chatglm-6b", "tokenizer_class": "ChatGLMTokenizer"}, 64794),
        ({"name_or_path": "zai-org/chatglm3-6b-32k"}, 64798),
        (
            {"auto_map": {"AutoTokenizer": ["THUDM/chatglm3-6b--tokenization_chatglm.X", None]}},
            64798,
        ),
        ({"added_tokens_decoder": {"64795": {"content": "<|user|>"}}}, 64798),
    ],
)
def test_family(folders, tmp_path, config, vocab_size):
    shutil.copy(folders["chatglm2"] / "tokenizer.model", tmp_path)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatGLMTokenizer.from_pretrained(tmp_path).vocab_size == vocab_size


@pytest.mark.parametrize("family", FAMILIES)
def test_save(tokenizers, folders, tmp_path, family):
    folder = tmp_path / "new" / "checkpoint-10"
    tokenizers[family].save(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "special_tokens_map.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    original = folders[family]
    model, config = "tokenizer.model", "tokenizer_config.json"
    assert (folder / model).read_bytes() == (original / model).read_bytes()
    assert json.loads((folder / config).read_text()) == json.loads((original / config).read_text())
    assert json.loads((folder / "special_tokens_map.json").read_text()) == {}
    assert ChatGLMTokenizer.from_pretrained(folder).special_tokens == (
        tokenizers[family].special_tokens
    )


def test_save_without_a_config_writes_chatglm2s(tokenizer, small_model, tmp_path):
    ChatGLMTokenizer(small_model).save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config == tokenizer.config


def test_bad_folders(folders, shared, small_model, tmp_path):
    def message(**files: bytes) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_bytes(content)
        with pytest.raises(InputError) as caught:
            ChatGLMTokenizer.from_pretrained(folder)
        text = str(caught.value)
        assert str(folder) in text and "\n" not in text
        return text.replace(str(folder), "FOLDER")

    model = (folders["chatglm2"] / "tokenizer.model").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:e7dc4c39\nsize 1018370\n"
    first_version = (shared / "data/tokenizer/ice_text.model").read_bytes()

    assert "FOLDER/tokenizer.model is missing; copy it" in message()
    assert "Git LFS pointer" in message(tokenizer__model=pointer)
    assert "git lfs pull" in message(tokenizer__model=pointer)
    for broken in (b"", b"<html>404</html>", model[:500_000]):
        assert "is not a SentencePiece model, or is cut short" in message(tokenizer__model=broken)
    assert "ChatGLM-6B (v1) folder" in message(ice_text__model=first_version)
    assert "ChatGLM-6B (v1) has" in message(tokenizer__model=first_version)
    assert "no end-of-sentence piece" in message(tokenizer__model=train_pieces(eos_id=-1))
    assert "tokenizer_config.json is not valid JSON" in message(
        tokenizer__model=small_model, tokenizer_config__json=b"{'a': 1}"
    )
    assert "tokenizer_config.json holds list" in message(
        tokenizer__model=small_model, tokenizer_config__json=b"[]"
    )


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        ChatGLMTokenizer.from_pretrained(tmp_path / "nowhere")


def test_torch_is_not_imported():
    modules = "glmkern.tokenizer, glmkern.training.data.rows"
    code = f"import sys, {modules}\nsys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
