"""The real tokenizer, and a model that talks with it."""

import pytest

from glmkern import ChatGLM, ChatGLMTokenizer
from tests.generation.models import chat_model


@pytest.fixture(scope="package")
def tokenizer(shared) -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(shared / "data" / "tokenizer")


@pytest.fixture(scope="module")
def model() -> ChatGLM:
    return chat_model()
