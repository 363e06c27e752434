"""Tokenizers of both families, and a small one that is trained here."""

import io
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece

from glmkern.tokenizer import ChatGLMTokenizer

FAMILIES = ("chatglm2", "chatglm3")


@pytest.fixture(scope="module")
def folders(shared: Path, tmp_path_factory) -> dict[str, Path]:
    """A folder as downloaded of each family, without weights."""
    folders = {}
    for family in FAMILIES:
        folders[family] = tmp_path_factory.mktemp(family)
        shutil.copy(shared / "data/tokenizer/tokenizer.model", folders[family])
        shutil.copy(shared / f"data/configs/{family}-6b/tokenizer_config.json", folders[family])
    return folders


@pytest.fixture(scope="module")
def tokenizers(folders) -> dict[str, ChatGLMTokenizer]:
    return {family: ChatGLMTokenizer.from_pretrained(folders[family]) for family in FAMILIES}


@pytest.fixture(scope="module")
def tokenizer(tokenizers) -> ChatGLMTokenizer:
    return tokenizers["chatglm2"]


@pytest.fixture(scope="module")
def recorded(golden: Path) -> dict:
    return json.loads((golden / "tokenizer.json").read_text(encoding="utf-8"))


def train_pieces(**options) -> bytes:
    """A small SentencePiece model with the conventions of the published one."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["红色 的 裙子", "蓝色 的 外套", "a red dress", "a blue coat"] * 9),
        model_writer=file,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return file.getvalue()


@pytest.fixture(scope="module")
def small_model() -> bytes:
    return train_pieces()
