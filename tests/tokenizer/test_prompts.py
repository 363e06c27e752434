"""Rounds, messages and their special ids as the official code writes them."""

import pytest

from glmkern.tokenizer import ChatGLMTokenizer


def test_chatglm3_knows_its_roles(tokenizers, recorded):
    expected = recorded["chatglm3"]["special"]
    assert tokenizers["chatglm3"].special_tokens == expected
    assert all(tokenizers["chatglm3"].decode([token]) == name for name, token in expected.items())
    for case in recorded["chatglm3"]["build_chat_input"]:
        text = tokenizers["chatglm3"].decode(case["input_ids"][0])
        assert text.startswith("[gMASK]sop") and text.endswith("你是谁<|assistant|>")


def test_chat_input(tokenizers, recorded):
    tokenizer = tokenizers["chatglm3"]
    assert len(recorded["chatglm3"]["build_chat_input"]) == 2
    for case in recorded["chatglm3"]["build_chat_input"]:
        assert (
            tokenizer.build_chat_input(case["query"], case["history"], case["role"])
            == (case["input_ids"][0])
        )
        assert (
            tokenizer.build_chat_input(case["query"], case["history"] or None)
            == (case["input_ids"][0])
        )


def test_chat_input_of_a_tool_call(tokenizers):
    """Every part begins with SentencePiece's space, and roles in a text stay text."""
    tokenizer = tokenizers["chatglm3"]
    history = [
        {"role": "user", "content": "<|user|>"},
        {"role": "assistant", "metadata": "weather", "content": "call()"},
    ]
    roles = tokenizer.special_tokens
    assert tokenizer.build_chat_input("24", history, role="observation") == [
        roles["[gMASK]"],
        roles["sop"],
        roles["<|user|>"],
        *plain(tokenizer, "\n"),
        *plain(tokenizer, "<|user|>"),
        roles["<|assistant|>"],
        *plain(tokenizer, "weather\n"),
        *plain(tokenizer, "call()"),
        roles["<|observation|>"],
        *plain(tokenizer, "\n"),
        *plain(tokenizer, "24"),
        roles["<|assistant|>"],
    ]


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_messages_that_cannot_be_said(tokenizers):
    with pytest.raises(ValueError, match="ChatGLM2's tokenizer has no roles; use build_inputs"):
        tokenizers["chatglm2"].build_chat_input("你好")
    build = tokenizers["chatglm3"].build_chat_input
    with pytest.raises(ValueError, match="there is no role 'tool'; there are system, user"):
        build("你好", role="tool")
    with pytest.raises(ValueError, match="there is no role None"):
        build("你好", [{"content": "hello"}])
    with pytest.raises(ValueError, match="the content of a message must be a text, not None"):
        build("你好", [{"role": "user"}])


def test_stop_tokens(tokenizers, small_model):
    assert tokenizers["chatglm2"].stop_token_ids == [2]
    assert tokenizers["chatglm3"].stop_token_ids == [2, 64795, 64797]
    assert ChatGLMTokenizer(small_model).stop_token_ids == [2]


def test_build_prompt(tokenizer, recorded):
    for case in recorded["chatglm2"]["build_prompt"]:
        assert tokenizer.build_prompt(case["query"], case["history"]) == case["prompt"]
        assert tokenizer.build_inputs(case["query"], case["history"]) == tokenizer.encode(
            case["prompt"]
        )


def test_build_inputs_of_two_rounds(tokenizer):
    first = [
        790,
        30951,
        517,
        30910,
        30939,
        30996,
        13,
        13,
        54761,
        31211,
        39701,
        13,
        13,
        55437,
        31211,
    ]
    second = [
        13,
        13,
        30995,
        30951,
        517,
        30910,
        30943,
        30996,
        13,
        13,
        54761,
        31211,
        32820,
        54266,
        31876,
        35153,
        13,
        13,
        55437,
        31211,
    ]
    answer = [39701, 243, 162, 148, 142]
    history = [("你好", "你好👋")]
    assert tokenizer.build_inputs("你好") == [64790, 64792, *first]
    assert tokenizer.build_inputs("晚上睡不着应该怎么办", history) == [
        64790,
        64792,
        *first,
        *answer,
        *second,
    ]
    assert tokenizer.build_stream_inputs("你好") == [64790, 64792, *first]
    assert tokenizer.build_stream_inputs("晚上睡不着应该怎么办", history) == second


def test_pair(tokenizer, recorded):
    first, second = [36474, 54591], [30910, 40637]
    build = tokenizer.build_inputs_with_special_tokens
    assert tokenizer.prefix_tokens == recorded["chatglm2"]["prefix_tokens"]
    assert build(first) == recorded["chatglm2"]["prefix_tokens"] + first
    assert build(first, second) == recorded["chatglm2"]["pair"]
