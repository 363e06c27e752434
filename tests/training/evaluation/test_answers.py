"""Batches, limits and the file of generated answers, with a stand-in for the model."""

import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from glmkern.errors import InputError, TrainingError
from glmkern.generation.sampling import InvalidScores
from glmkern.model.config import ChatGLMConfig
from glmkern.tokenizer import ChatGLMTokenizer
from glmkern.training.data.examples import Example, Examples
from glmkern.training.data.rows import build_evaluation_rows
from glmkern.training.evaluation.answers import Decoding, PredictionFile, answer, clean, decode
from glmkern.training.flags.arguments import build
from tests.model.models import SMALL
from tests.training.stand_in import Echo


@pytest.fixture(scope="module")
def tokenizer(shared) -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(shared / "data/tokenizer")


def rows_of(tokenizer, lengths: dict[int, int]):
    """Evaluation rows: place in the file to length of the question in characters."""
    examples = [Example("长" * length, "好", (), index) for index, length in lengths.items()]
    return build_evaluation_rows(
        Examples(examples), tokenizer, max_source_length=64, max_target_length=8
    )


def test_answers_have_the_room_that_the_official_padding_leaves(tokenizer):
    """The room is counted from the longest prompt of the same 1,000 rows of the file."""
    rows = rows_of(tokenizer, {0: 3, 1: 20, 999: 5, 1000: 7, 1001: 2, 2500: 4})
    model = Echo()
    batches = list(answer(model, rows, Decoding(max_length=60, batch_size=2)))
    assert [len(batch) for batch in batches] == [2, 1, 2, 1]
    rooms = [60 - len(ids) for ids in rows.input_ids]
    assert len(set(rooms)) == 3
    assert [len(ids) for batch in batches for ids in batch] == rooms

    assert [ids for input_ids, _, _ in model.calls for ids in input_ids.tolist()] == rows.input_ids
    assert [row for _, mask, _ in model.calls for row in mask.tolist()] == rows.attention_mask
    for _, _, options in model.calls:
        assert options["do_sample"] is False and "num_beams" not in options


def test_flags_of_generation_reach_the_model(tokenizer):
    model = Echo()
    list(
        answer(
            model,
            rows_of(tokenizer, {0: 3}),
            Decoding(60, batch_size=1, num_beams=4, do_sample=True, seed=9, cuda_graphs=False),
        )
    )
    options = model.calls[0][2]
    assert options.pop("generator").initial_seed() == 9
    assert options == {
        "max_length": 60,
        "num_beams": 4,
        "do_sample": True,
        "top_p": 0.7,
        "top_k": 50,
        "temperature": 0.95,
        "cuda_graphs": False,
    }


@pytest.mark.parametrize(("flag", "graphs"), [("auto", None), ("off", False)])
def test_cuda_graphs_are_a_flag(flag, graphs):
    arguments = build({"cuda_graphs": flag})
    assert Decoding.of(arguments, ChatGLMConfig.from_dict(SMALL)).cuda_graphs is graphs


def test_no_room_is_an_empty_answer(tokenizer):
    rows = rows_of(tokenizer, {0: 3, 1: 30, 1000: 3})
    width = len(rows.input_ids[0])
    model = Echo()
    answers = list(answer(model, rows, Decoding(max_length=width, batch_size=8)))
    assert [[len(ids) for ids in batch] for batch in answers] == [
        [0, 0],
        [width - len(rows.input_ids[2])],
    ]
    assert len(model.calls) == 1


@pytest.mark.parametrize(
    "error, words",
    [
        (
            torch.OutOfMemoryError("2 GiB"),
            "prompts 1 to 2: ran out of GPU memory; lower --per_device",
        ),
        (InvalidScores(), "prompts 1 to 2: the model's scores are not finite"),
    ],
)
def test_failed_generation(tokenizer, monkeypatch, error, words):
    def fail(*args, **options):
        raise error

    model = Echo()
    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(TrainingError, match=words):
        list(answer(model, rows_of(tokenizer, {0: 3, 1: 3}), Decoding(60, batch_size=2)))


@pytest.mark.parametrize("name", ["THUDM/chatglm2-6b", "THUDM/chatglm3-6b"])
def test_ids_without_text_of_their_own(shared, tmp_path, name):
    """ChatGLM3's tokenizer has names for the special ones, which are no part of an answer."""
    (tmp_path / "tokenizer.model").symlink_to(shared / "data/tokenizer/tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"name_or_path": name}))
    tokenizer = ChatGLMTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode("你好")
    assert ("[gMASK]" in tokenizer.decode(ids)) == ("chatglm3" in name)
    assert decode(tokenizer, [*ids, tokenizer.vocab_size, 2, 0, 65023]) == "你好"


@given(st.text(" .?!,'ntmsvre a好\n", max_size=12))
def test_spacing_is_mended_as_transformers_does(text):
    assert clean(text) == PreTrainedTokenizerBase.clean_up_tokenization(None, text).strip()


def test_lines_are_there_as_they_are_written(tmp_path):
    path = tmp_path / "generated_predictions.txt"
    path.write_text("of an earlier run\n")
    with PredictionFile(path) as file:
        assert path.read_text() == "of an earlier run\n"
        file.write(" a dog .\n", '\u2028好"')
        first = path.read_text()
        assert json.loads(first) == {"labels": '\u2028好"'.strip(), "predict": "a dog."}
        assert "好" in first and first.endswith("\n")
        file.write("", "好")
        assert path.read_text() == first + '{"labels": "好", "predict": ""}\n'


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_full_disk(tmp_path):
    (tmp_path / "generated_predictions.txt").symlink_to("/dev/full")
    with (
        pytest.raises(InputError, match="No space left on device"),
        PredictionFile(tmp_path / "generated_predictions.txt") as file,
    ):
        file.write("a", "b")
