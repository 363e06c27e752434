"""Text to ids and back, and batches of texts."""

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from glmkern.tokenizer import ChatGLMTokenizer
from tests.tokenizer.conftest import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_strings(tokenizers, recorded, family):
    tokenizer = tokenizers[family]
    assert len(recorded[family]["strings"]) == 16
    for case in recorded[family]["strings"]:
        assert tokenizer.tokenize(case["text"]) == case["tokens"]
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"]
        assert tokenizer.encode(case["text"]) == case["ids_special"]
        assert tokenizer.decode(case["ids"]) == case["decode_ids"]
        assert tokenizer.decode(case["ids_special"]) == case["decode_special"]


@pytest.mark.parametrize("family", FAMILIES)
def test_special_ids(tokenizers, recorded, family):
    tokenizer, expected = tokenizers[family], recorded[family]
    assert tokenizer.vocab_size == expected["vocab_size"]
    assert tokenizer.pad_token_id == expected["pad_token_id"]
    assert tokenizer.eos_token_id == expected["eos_token_id"]
    assert {name: tokenizer.get_command(name) for name in expected["commands"]} == expected[
        "commands"
    ]


def test_batches(tokenizer, recorded):
    names = ("input_ids", "attention_mask", "position_ids")
    assert len(recorded["chatglm2"]["batches"]) == 5
    for case in recorded["chatglm2"]["batches"]:
        batch = tokenizer(case["texts"], **case["kwargs"])
        assert batch == {name: case[name] for name in names}


def test_one_text_gives_flat_lists(tokenizer):
    assert tokenizer("你好", padding="max_length", max_length=6) == {
        "input_ids": [0, 0, 64790, 64792, 36474, 54591],
        "attention_mask": [0, 0, 1, 1, 1, 1],
        "position_ids": [0, 0, 0, 1, 2, 3],
    }
    assert tokenizer("你好", padding="max_length", max_length=3)["input_ids"] == [
        64790,
        64792,
        36474,
        54591,
    ]


def test_decode(tokenizer, recorded):
    for case in recorded["chatglm2"]["decode_prefixes"]:
        assert tokenizer.decode(case["ids"]) == case["text"]
    for case in recorded["chatglm2"]["decode_special_mix"]:
        assert tokenizer.decode(case["ids"]) == case["text"] == case["skip"]
    assert tokenizer.decode([36474, -100, 54591]) == "你好"


def test_an_id_without_text_separates_bytes(tokenizer):
    assert tokenizer.decode([243, 162, 148, 142]) == "👋"
    assert tokenizer.decode([243, 162, 0, 148, 142]) == "\ufffd" * 4


def test_decode_refuses_ids_beyond_the_vocabulary(tokenizers):
    with pytest.raises(ValueError, match="64794 has no text, as ids end at 64793"):
        tokenizers["chatglm2"].decode([64794])
    assert tokenizers["chatglm3"].decode([64794]) == "<|system|>"
    with pytest.raises(ValueError, match="64798"):
        tokenizers["chatglm3"].decode([64798])


# SentencePiece writes a space as U+2581, so that character in a text comes back as a space.
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
@settings(max_examples=300, deadline=None)
def test_text_survives_encoding(tokenizers, text):
    for tokenizer in tokenizers.values():
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizers["chatglm2"].decode(tokenizers["chatglm2"].encode(text)) == text


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
@settings(max_examples=100, deadline=None)
def test_text_survives_a_small_vocabulary(small_model, text):
    tokenizer = ChatGLMTokenizer(small_model)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_small_vocabulary(small_model):
    pieces = sentencepiece.SentencePieceProcessor()
    pieces.LoadFromSerializedProto(small_model)
    size = pieces.get_piece_size()
    tokenizer = ChatGLMTokenizer(small_model)
    assert 256 < size <= 300 and tokenizer.vocab_size == size + 5
    assert tokenizer.special_tokens == {
        "[MASK]": size,
        "[gMASK]": size + 1,
        "[sMASK]": size + 2,
        "sop": size + 3,
        "eop": size + 4,
    }
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
    assert tokenizer.build_inputs("红色")[:2] == [size + 1, size + 3]


def test_padding_needs_sensible_lengths(tokenizer):
    with pytest.raises(ValueError, match="'right'"):
        tokenizer("你好", padding="right")
    with pytest.raises(ValueError, match="max_length is needed"):
        tokenizer("你好", truncation=True)
    with pytest.raises(ValueError, match="max_length is needed"):
        tokenizer("你好", padding="max_length")
    with pytest.raises(ValueError, match=r"at least 3 .* not 2"):
        tokenizer("你好", truncation=True, max_length=2)
    assert tokenizer("你好", truncation=True, max_length=1, add_special_tokens=False)[
        "input_ids"
    ] == [36474]
    with pytest.raises(ValueError, match=r"'\[CLS\]' is not a special token; .*\[gMASK\]"):
        tokenizer.get_command("[CLS]")


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"character 3 of the text is '\\ud83d'"):
        tokenizer.encode("你好\ud83d")
