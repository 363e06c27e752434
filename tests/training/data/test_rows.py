"""Rows of token ids, against those of the official code."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from glmkern.tokenizer import ChatGLMTokenizer
from glmkern.training.data.examples import Example, Examples, read_examples
from glmkern.training.data.rows import TrainingRows, build_evaluation_rows, build_training_rows

# The conversation of the official README, as it stands in its training file.
TURNS = (
    (
        "长城h3风扇不转。继电器好的。保险丝好的传感器新的风扇也新的这是为什么。就是继电器缺一个信号线",
        "用电脑能读数据流吗？水温多少",
    ),
    ("95", "上下水管温差怎么样啊？空气是不是都排干净了呢？"),
    (
        "是的。上下水管都好的",
        "那就要检查线路了，一般风扇继电器是由电脑控制吸合的，如果电路存在断路，或者电脑坏了的话会出现继电器不吸合的情况！",
    ),
)


@pytest.fixture(scope="module")
def tokenizer(shared: Path) -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(shared / "data/tokenizer")


@pytest.fixture(scope="module")
def recorded(golden: Path) -> dict:
    return json.loads((golden / "preprocess.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def adgen(shared: Path) -> Examples:
    return read_examples(
        shared / "data/advertisegen/dev.json", "content", "summary", max_examples=8
    )


@pytest.fixture
def chat(tmp_path: Path) -> Examples:
    rows = [
        {"prompt": prompt, "response": response, "history": TURNS[:i]}
        for i, (prompt, response) in enumerate(TURNS)
    ]
    path = tmp_path / "chat.json"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return read_examples(path, "prompt", "response", "history")


def padded(rows: TrainingRows, width: int) -> list[dict[str, list[int]]]:
    """The official layout: ids padded with 0 and labels with -100, on the right."""
    return [
        {
            "input_ids": row.input_ids + [0] * (width - len(row.input_ids)),
            "labels": row.labels + [-100] * (width - len(row.labels)),
        }
        for row in rows.rows
    ]


def ids_and_labels(rows: list[dict]) -> list[dict[str, list[int]]]:
    return [{name: row[name] for name in ("input_ids", "labels")} for row in rows]


@pytest.mark.parametrize(
    ("name", "source", "target", "count"),
    [
        ("adgen_train_64_128", 64, 128, 8),
        ("adgen_train_trunc_16_24", 16, 24, 3),
        ("chat_train_256_256", 256, 256, 1),
        ("chat_train_trunc_40_20", 40, 20, 1),
    ],
)
def test_official_training_rows(tokenizer, recorded, adgen, chat, name, source, target, count):
    examples = adgen if name.startswith("adgen") else chat
    rows = build_training_rows(
        examples, tokenizer, max_source_length=source, max_target_length=target
    )
    assert len(recorded[name]) == count
    assert [tokenizer.build_prompt(each.prompt, each.history) for each in examples][:count] == [
        row["prompt"] for row in recorded[name]
    ]
    assert padded(rows, source + target + 1)[:count] == ids_and_labels(recorded[name])


def test_official_rows_that_learn_the_padding(tokenizer, recorded, adgen):
    rows = build_training_rows(
        adgen,
        tokenizer,
        max_source_length=64,
        max_target_length=128,
        ignore_pad_token_for_loss=False,
    ).rows
    expected = recorded["adgen_train_noignore_64_128"][0]
    assert (rows[0].input_ids, rows[0].labels) == (expected["input_ids"], expected["labels"])
    assert {len(row.input_ids) for row in rows} == {len(row.labels) for row in rows} == {193}
    assert all(min(row.labels) == 0 for row in rows)


def test_official_collated_batch(tokenizer, recorded, adgen):
    rows = build_training_rows(adgen, tokenizer, max_source_length=64, max_target_length=128)
    expected = recorded["collated_first3"]
    width = len(expected["input_ids"][0])
    assert [row["input_ids"] for row in padded(rows, width)[:3]] == expected["input_ids"]
    assert [row["labels"] for row in padded(rows, width)[:3]] == expected["labels"]
    assert expected["attention_mask"] == [[1] * width] * 3
    assert expected["position_ids"] == [list(range(width))] * 3


@pytest.mark.parametrize(
    ("name", "source", "target"), [("adgen_eval_64_64", 64, 64), ("chat_eval_256_256", 256, 256)]
)
def test_official_evaluation_rows(tokenizer, recorded, adgen, chat, name, source, target):
    examples = adgen if name.startswith("adgen") else chat
    rows = build_evaluation_rows(
        examples, tokenizer, max_source_length=source, max_target_length=target
    )
    expected = recorded[name]
    assert [each.response for each in examples] == expected["targets"]
    for column in ("input_ids", "attention_mask", "position_ids", "labels"):
        assert getattr(rows, column) == expected[column]


def test_evaluation_prompts_are_padded_by_the_thousand(tokenizer):
    prompts = {0: "短", 998: "一个长一些的问题", 999: "短", 1000: "短", 2500: "另外一个问题"}
    examples = Examples([Example(prompt, "好", (), index) for index, prompt in prompts.items()])
    rows = build_evaluation_rows(examples, tokenizer, max_source_length=64, max_target_length=64)
    lengths = {index: len(tokenizer.build_inputs(prompt)) for index, prompt in prompts.items()}
    assert [len(row) for row in rows.input_ids] == [
        lengths[998],
        lengths[998],
        lengths[998],
        lengths[1000],
        lengths[2500],
    ]
    assert lengths[998] > lengths[0] and [sum(mask) for mask in rows.attention_mask] == list(
        lengths.values()
    )


def test_end_of_text_is_learned_where_it_is_the_padding(tokenizer, shared):
    first_release = ChatGLMTokenizer.from_pretrained(shared / "data/tokenizer")
    first_release.pad_token_id = first_release.eos_token_id
    examples = Examples([Example("你好", "你好")])
    lengths = {"max_source_length": 64, "max_target_length": 64}
    rows = build_training_rows(examples, first_release, **lengths)
    assert rows == build_training_rows(examples, tokenizer, **lengths)
    assert rows.rows[0].labels[-3:] == [36474, 54591, 2]


def test_a_response_id_equal_to_the_padding_is_learned():
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red dress", "a blue coat"] * 9),
        model_writer=file,
        model_type="bpe",
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = ChatGLMTokenizer(file.getvalue())
    unknown = tokenizer.encode("red 裙 dress", add_special_tokens=False)
    assert unknown.count(tokenizer.pad_token_id) == 1

    (row,) = build_training_rows(
        Examples([Example("裙", "red 裙 dress")]),
        tokenizer,
        max_source_length=64,
        max_target_length=64,
    ).rows
    prompt = len(tokenizer.build_inputs("裙"))
    assert tokenizer.pad_token_id in row.input_ids[:prompt]
    assert row.labels == [-100] * prompt + unknown + [2]


@given(
    prompt=st.text(max_size=30),
    response=st.text(max_size=30),
    source=st.integers(3, 40),
    target=st.integers(1, 20),
)
@settings(max_examples=200, deadline=None)
def test_labels_follow_positions(tokenizer, prompt, response, source, target):
    rows = build_training_rows(
        Examples([Example(prompt, response)]),
        tokenizer,
        max_source_length=source,
        max_target_length=target,
    )
    (row,) = rows.rows
    ids = tokenizer.build_inputs(prompt)
    answer = tokenizer.encode(response, add_special_tokens=False)
    assert row.input_ids == ids[:source] + answer[:target] + [2]
    assert row.labels == [-100] * min(len(ids), source) + row.input_ids[min(len(ids), source) :]
    assert (rows.truncated_prompts, rows.truncated_responses) == (
        len(ids) > source,
        len(answer) > target,
    )


def test_source_prefix_stands_before_the_first_round(tokenizer):
    lengths = {"max_source_length": 64, "max_target_length": 64, "source_prefix": "翻译："}
    examples = Examples([Example("你好", "hello", (("早", "morning"),))])
    prompt = tokenizer.encode(
        "翻译：[Round 1]\n\n问：早\n\n答：morning\n\n[Round 2]\n\n问：你好\n\n答："
    )
    (row,) = build_training_rows(examples, tokenizer, **lengths).rows
    assert row.input_ids[: len(prompt)] == prompt and row.labels[len(prompt) - 1] == -100
    assert build_evaluation_rows(examples, tokenizer, **lengths).input_ids == [prompt]


def test_report(tokenizer):
    examples = Examples([Example("你好", "你好"), Example("长" * 60, "好" * 40)], skipped=3)
    cut = build_training_rows(examples, tokenizer, max_source_length=30, max_target_length=10)
    assert (cut.rows_read, cut.skipped) == (5, 3)
    assert (cut.truncated_prompts, cut.truncated_responses) == (1, 1)
    assert [row.labels[-1] for row in cut.rows] == [2, 2]
    text = cut.report()
    assert text.startswith("5 rows read, 3 of them left out (the prompt or the response is empty)")
    assert (
        f"1 of 2 prompts cut, which loses the end of the question (--max_source_length "
        f"{cut.longest_prompt} keeps all)" in text
    )
    assert f"1 of 2 responses cut (--max_target_length {cut.longest_response} keeps all)" in text

    whole = build_training_rows(
        examples,
        tokenizer,
        max_source_length=cut.longest_prompt,
        max_target_length=cut.longest_response,
    )
    assert (whole.truncated_prompts, whole.truncated_responses) == (0, 0)
    assert "none cut" in whole.report() and str(whole.longest_prompt) in whole.report()

    judged = build_evaluation_rows(examples, tokenizer, max_source_length=30, max_target_length=10)
    assert judged.longest_response == cut.longest_response + 2
    assert [len(labels) for labels in judged.labels] == [4, 10]


@pytest.mark.parametrize(
    ("build", "source", "target", "message"),
    [
        (build_training_rows, 2, 1, "max_source_length must be at least 3 .* not 2"),
        (build_training_rows, 3, 0, "max_target_length must be at least 1 .* not 0"),
        (build_evaluation_rows, 2, 3, "max_source_length must be at least 3 .* not 2"),
        (build_evaluation_rows, 3, 2, "max_target_length must be at least 3 .* not 2"),
    ],
)
def test_lengths_that_leave_no_text(tokenizer, build, source, target, message):
    with pytest.raises(ValueError, match=message):
        build(
            Examples([Example("你好", "你好")]),
            tokenizer,
            max_source_length=source,
            max_target_length=target,
        )
