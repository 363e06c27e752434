import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from glmkern.errors import InputError
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
