"""The demo's data, tokenizer and base, and its verdict; the whole of it runs as `make demo`."""

import json
from itertools import combinations, islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glmkern import ChatGLM, ChatGLMConfig, ChatGLMTokenizer, demo
from glmkern.checkpoint import expected_shapes, read_base, to_glm_state
from glmkern.demo import make_base
from glmkern.demo.corpus import HELD_OUT_ROWS, TRAINING_ROWS, pretraining, sample
from glmkern.demo.evaluation import evaluate
from glmkern.demo.grammar import SAMPLE_STYLE
from glmkern.demo.rouge import rouge_l
from glmkern.model.packing import pack_rows
from glmkern.tokenizer import SPECIAL_TOKENS
from glmkern.training.data.examples import Example, read_examples
from glmkern.training.data.rows import build_training_rows
from glmkern.training.flags.parser import parse

LENGTHS = {"max_source_length": 256, "max_target_length": 128}


@pytest.fixture(scope="module")
def tokenizer() -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(demo.BASE)


@pytest.fixture(scope="module")
def base() -> ChatGLM:
    return ChatGLM.from_pretrained(demo.BASE, device="cpu").eval()


@pytest.fixture(scope="module")
def unseen():
    """Exchanges of the kinds the base was trained on, drawn by another seed."""
    return list(islice(pretraining(make_base.SEED + 1), 200))


def shipped():
    return [
        read_examples(file, demo.PROMPT_COLUMN, demo.RESPONSE_COLUMN)
        for file in (demo.TRAIN_FILE, demo.HELD_OUT_FILE)
    ]


# The sample


def test_the_sample_has_243_rows_to_tune_on_and_40_held_out():
    training, held_out = shipped()
    assert (len(training), training.skipped) == (TRAINING_ROWS, 0) == (243, 0)
    assert (len(held_out), held_out.skipped) == (HELD_OUT_ROWS, 0) == (40, 0)


def test_the_shipped_sample_is_what_the_grammar_generates():
    for file, rows in zip((demo.TRAIN_FILE, demo.HELD_OUT_FILE), sample(), strict=True):
        assert file.read_text(encoding="utf-8") == make_base.json_lines(rows)


def test_training_held_out_and_pretraining_share_no_goods_and_no_answer():
    count = make_base.STEPS * make_base.BATCH
    make_base.check_disjoint(*shipped(), list(islice(pretraining(make_base.SEED), count)))


@pytest.mark.parametrize(
    "other",
    [
        Example("品名#茶杯*材质#陶瓷*颜色#天蓝", "y"),
        Example("请介绍：品名#茶杯*颜色#天蓝*材质#陶瓷", "y"),
        Example("品名#茶杯*颜色#天蓝*材质#陶瓷，它的颜色是什么？", "天蓝。"),
        Example("写出属性：一件茶杯。", "y"),
        Example("x", "一件茶杯。"),
        Example("x", "y", (("品名#茶杯*颜色#天蓝*材质#陶瓷", "z"),)),
        Example("x", "y", (("z", "一件茶杯。"),)),
    ],
)
def test_goods_or_texts_in_two_parts_are_refused(other):
    row = Example("品名#茶杯*颜色#天蓝*材质#陶瓷", "一件茶杯。")
    make_base.check_disjoint([row], [Example("品名#茶杯*颜色#墨绿", "两件茶杯。")])
    with pytest.raises(ValueError, match="two parts of the data"):
        make_base.check_disjoint([row], [other])


def test_the_sample_is_signed_as_nothing_in_pretraining_is(unseen):
    signature = SAMPLE_STYLE.signature
    assert all(row.response.endswith(signature) for part in shipped() for row in part)
    assert not any(signature in row.response for row in unseen)
    assert any(row.response.endswith(signature[-6:]) for row in unseen)


# The tokenizer: the conventions of the official one


def test_unknown_beginning_end_and_the_bytes_come_first(tokenizer):
    pieces = [tokenizer._pieces.id_to_piece(i) for i in range(259)]
    assert pieces == ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    assert not any(tokenizer._pieces.is_byte(i) for i in range(259, 300))


def test_the_special_tokens_follow_the_pieces_and_the_matrices_are_padded(tokenizer):
    assert list(tokenizer.special_tokens) == list(SPECIAL_TOKENS)
    assert tokenizer.special_tokens["[MASK]"] == tokenizer._pieces.get_piece_size()
    rows = ChatGLMConfig.from_pretrained(demo.BASE).padded_vocab_size
    assert tokenizer.vocab_size <= rows < tokenizer.vocab_size + 64
    assert rows % 64 == 0


def test_newlines_and_unseen_characters_are_bytes_and_digits_stand_alone(tokenizer):
    assert tokenizer.encode("\n", add_special_tokens=False)[-1] == 3 + ord("\n")
    emoji = tokenizer.encode("😀", add_special_tokens=False)
    assert emoji[-4:] == [3 + byte for byte in "😀".encode()]
    assert tokenizer.tokenize("2024")[-4:] == ["2", "0", "2", "4"]


def test_a_space_is_put_in_front_and_spaces_are_kept(tokenizer):
    assert tokenizer.tokenize("茶杯")[0].startswith("▁")
    for text in ("  two  spaces ", "a\n\nb", "ｆｕｌｌ Ⅷ ﬁ", "tab\there"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_sample_needs_no_byte_of_fallback_and_decodes_to_itself(tokenizer):
    for row in (row for part in shipped() for row in part):
        for text in (row.prompt, row.response):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert min(ids) > 258, text
            assert tokenizer.decode(ids) == text


# The base


def test_the_base_is_the_official_layout_of_a_few_megabytes():
    config = ChatGLMConfig.from_pretrained(demo.BASE)
    weights = dict(read_base(demo.BASE, config))
    assert {name: tuple(each.shape) for name, each in weights.items()} == expected_shapes(config)
    assert {each.dtype for each in weights.values()} == {torch.float16}
    assert sum(file.stat().st_size for file in demo.HERE.rglob("*.*")) < 6_000_000
    values = json.loads((demo.BASE / "config.json").read_bytes())
    assert values["model_type"] == "chatglm" and values["torch_dtype"] == "float16"
    assert values["multi_query_attention"] and values["add_qkv_bias"] and values["rmsnorm"]
    assert (values["seq_length"], values["eos_token_id"], values["pad_token_id"]) == (2048, 2, 0)


def test_its_logits_are_those_of_transformers(base, tokenizer):
    from transformers import GlmConfig, GlmForCausalLM

    weights = {name: each.float() for name, each in read_base(demo.BASE, base.config)}
    values, state = to_glm_state(weights, base.config)
    native = GlmForCausalLM(GlmConfig(**{**values, "dtype": "float32"})).eval()
    native.load_state_dict(state)
    prompts = [tokenizer.build_prompt(row.prompt) + row.response for row in shipped()[1][:1]]
    input_ids = torch.tensor([tokenizer.encode(text) for text in prompts])
    with torch.no_grad():
        ours, theirs = base(input_ids).logits, native(input_ids).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_it_has_learned_its_language(base, tokenizer, unseen):
    rows = build_training_rows(unseen, tokenizer, **LENGTHS).rows
    with torch.no_grad():
        loss = base.loss(pack_rows(rows)).item()
    assert loss < 0.3


def test_it_answers_questions_about_goods_it_never_saw(base, tokenizer, unseen):
    questions = [row for row in unseen if row.prompt.endswith("是什么？")]
    answers = evaluate(base, tokenizer, questions, **LENGTHS).answers
    right = sum(answer == row.response for answer, row in zip(answers, questions, strict=True))
    assert right >= 0.75 * len(questions) >= 6


# The command and its verdict


def test_the_command_is_what_the_parser_takes():
    for settings in (demo.DEMO, demo.PUBLISHED):
        line = demo.tuning_arguments(demo.BASE, demo.TRAIN_FILE, "output", settings)
        arguments = parse(line).to_dict()
        assert arguments["do_train"] and arguments["model_name_or_path"] == str(demo.BASE)
        for name, value in settings.items():
            assert arguments[name] == float(value), name


def test_the_printed_command_is_the_one_that_runs(tmp_path, monkeypatch):
    import shlex

    monkeypatch.chdir(tmp_path)
    line = demo.tuning_arguments(demo.BASE, "a file.json", tmp_path / "out", demo.DEMO)
    printed = shlex.split(demo.as_command(line).replace("\\\n", " "))
    assert printed[:3] == ["python", "-m", "glmkern"]
    assert len(printed) == 3 + len(line)
    assert printed[printed.index("--output_dir") + 1] == "out"
    assert printed[printed.index("--train_file") + 1] == "a file.json"


def test_a_prefix_that_learned_nothing_fails_the_demo(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(demo, "DEMO", {**demo.DEMO, "max_steps": 1, "save_steps": 1})
    assert demo.run(["--output_dir", str(tmp_path / "out")]) == 1
    assert "The demo failed" in capfd.readouterr().err
    assert (tmp_path / "out" / "checkpoint-1" / "pytorch_model.bin").is_file()


def test_a_tuning_that_fails_fails_the_demo_with_its_status(tmp_path, capfd):
    (tmp_path / "file").touch()
    assert demo.run(["--output_dir", str(tmp_path / "file" / "out")]) == 2
    assert "--output_dir" in capfd.readouterr().err


# ROUGE-L


@given(st.text("甲乙丙", max_size=7), st.text("甲乙丙", max_size=7))
def test_rouge_l_is_that_of_the_longest_common_subsequence(a, b):
    def subsequences(text):
        return {"".join(part) for n in range(1, len(text) + 1) for part in combinations(text, n)}

    common = max(map(len, subsequences(a) & subsequences(b)), default=0)
    assert rouge_l(a, b) == (2 * common / (len(a) + len(b)) if common else 0)
