"""Evaluation and prediction through the command line, against the official way of doing it."""

import json
import shutil
from pathlib import Path
from statistics import fmean

import jieba
import pytest
import torch
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge

from bench.oracles import diffusers_twin, twin_forward
from glmkern import cli
from glmkern.chatglm import ChatGLM
from glmkern.checkpoint import read_prefix, write_prefix
from glmkern.tokenizer import ChatGLMTokenizer
from tests.official import command, refused, write_base

PREFIX_LENGTH = 5
SCORES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
SPEED = ("runtime", "samples", "samples_per_second", "steps_per_second")
SOURCE, TARGET = 40, 12


@pytest.fixture(scope="module")
def base(shared, tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), shared / "data" / "tokenizer")


@pytest.fixture(scope="module")
def tokenizer(base) -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(base)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """What a training run left in the output folder: a prefix and its results."""
    folder = tmp_path / "out" / "checkpoint-3000"
    folder.mkdir(parents=True)
    write_prefix(folder, {"embedding.weight": torch.randn(PREFIX_LENGTH, 16)})
    (tmp_path / "out" / "all_results.json").write_text('{"train_loss": 3.5}')
    return folder


@pytest.fixture
def records(shared) -> list[dict[str, str]]:
    """Seven rows of AdvertiseGen whose prompts have several lengths."""
    lines = (shared / "data" / "advertisegen" / "dev.json").read_text().split("\n")[20:27]
    records = [json.loads(line) for line in lines]
    return [
        {**record, "content": record["content"][: 14 + 9 * i]} for i, record in enumerate(records)
    ]


@pytest.fixture
def dev(records, tmp_path) -> Path:
    path = tmp_path / "dev.json"
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records))
    return path


@pytest.fixture
def flags(base, dev, checkpoint) -> dict[str, object]:
    """The published evaluate.sh, made small."""
    return {
        "do_predict": True,
        "validation_file": dev,
        "test_file": dev,
        "overwrite_cache": True,
        "prompt_column": "content",
        "response_column": "summary",
        "model_name_or_path": base,
        "ptuning_checkpoint": checkpoint,
        "output_dir": checkpoint.parent,
        "overwrite_output_dir": True,
        "max_source_length": SOURCE,
        "max_target_length": TARGET,
        "per_device_eval_batch_size": 1,
        "predict_with_generate": True,
        "pre_seq_len": PREFIX_LENGTH,
        "quantization_bit": 4,
    }


@pytest.fixture
def plain(flags) -> dict[str, object]:
    """The same without a prefix and in full precision."""
    return {
        name: value
        for name, value in flags.items()
        if name not in ("ptuning_checkpoint", "pre_seq_len", "quantization_bit")
    }


def predictions(folder: Path) -> list[dict[str, str]]:
    lines = (folder / "generated_predictions.txt").read_text().split("\n")
    assert lines.pop() == ""
    return [json.loads(line) for line in lines]


def results(folder: Path, split: str) -> dict[str, float]:
    return json.loads((folder / f"{split}_results.json").read_text())


def names(split: str, *metrics: str) -> set[str]:
    return {f"{split}_{name}" for name in (*metrics, *SPEED)}


# The official way, written with other people's code


def official_prompts(tokenizer, records) -> dict[str, torch.Tensor]:
    prompts = [f"[Round 1]\n\n问：{record['content']}\n\n答：" for record in records]
    columns = tokenizer(prompts, padding=True, truncation=True, max_length=SOURCE)
    return {name: torch.tensor(column) for name, column in columns.items()}


@torch.no_grad()
def official_greedy(twin, prompts: dict[str, torch.Tensor], max_length: int) -> list[list[int]]:
    """Rows one at a time, padded, without a cache."""
    answers = []
    for ids, mask, positions in zip(*prompts.values(), strict=True):
        width = len(ids)
        while len(ids) < max_length and int(ids[-1]) != 2:
            _, logits = twin_forward(twin, ids[None], mask[None], positions[None])
            ids = torch.cat([ids, logits[0, -1].argmax()[None]])
            mask = torch.cat([mask, mask.new_ones(1)])
            positions = torch.cat([positions, positions[-1:] + 1])
        answers.append(ids[width:].tolist())
    return answers


def official_scores(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """compute_metrics of ptuning/main.py, which has no answer without text."""
    scores = {name: [] for name in SCORES}
    for predict, label in pairs:
        rouge = Rouge().get_scores(" ".join(jieba.cut(predict)), " ".join(jieba.cut(label)))[0]
        for name, value in rouge.items():
            scores[name].append(round(value["f"] * 100, 4))
        bleu = sentence_bleu(
            [list(label)], list(predict), smoothing_function=SmoothingFunction().method3
        )
        scores["bleu-4"].append(round(bleu * 100, 4))
    return {name: fmean(values) for name, values in scores.items()}


def official_labels(tokenizer, records) -> list[str]:
    ids = tokenizer([record["summary"] for record in records], truncation=True, max_length=TARGET)
    return [tokenizer.decode(row) for row in ids["input_ids"]]


def text(tokenizer, ids: list[int]) -> str:
    """Ids beyond the vocabulary, for which the official decoding has an error, are padding."""
    return tokenizer.decode([token if token < tokenizer.vocab_size else 0 for token in ids])


# Prediction


def test_published_evaluate_sh(flags, checkpoint, records, tokenizer, capsys):
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert cli.main(command(flags)) == 0
    out = checkpoint.parent
    assert {path.name for path in out.iterdir()} == {
        "checkpoint-3000",
        "generated_predictions.txt",
        "predict_results.json",
        "all_results.json",
    }
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before

    lines = predictions(out)
    assert [list(line) for line in lines] == [["labels", "predict"]] * len(records)
    assert [line["labels"] for line in lines] == [
        label.strip() for label in official_labels(tokenizer, records)
    ]
    assert "\\u" not in (out / "generated_predictions.txt").read_text()
    metrics = results(out, "predict")
    assert metrics.keys() == names("predict", *SCORES)
    assert metrics["predict_samples"] == 7
    assert json.loads((out / "all_results.json").read_text()) == {"train_loss": 3.5, **metrics}

    captured = capsys.readouterr()
    assert "7 rows read, 0 of them left out" in captured.out and "prompts cut" in captured.out
    assert "(--max_target_length " in captured.out and "tokens a prompt: mean" in captured.out
    assert "***** predict metrics *****\n  predict_bleu-4             =" in captured.out
    assert "rouge-l" in captured.err and "7/7" in captured.err  # the bar, with the scores so far


@pytest.mark.parametrize("prefix", [True, False])
def test_greedy_answers_and_scores_are_the_official_ones(
    flags, plain, prefix, checkpoint, base, tokenizer, records
):
    run = {**(flags if prefix else plain), "greedy": True, "per_device_eval_batch_size": 3}
    run.pop("quantization_bit", None)
    assert cli.main(command(run)) == 0
    model = ChatGLM.from_pretrained(base, prefix_checkpoint=checkpoint if prefix else None)
    prompts = official_prompts(tokenizer, records)
    assert 0 < prompts["attention_mask"][:, 0].sum() < len(records)  # some are padded
    answers = official_greedy(diffusers_twin(model), prompts, SOURCE + TARGET + 1)
    answers = [text(tokenizer, ids) for ids in answers]
    labels = official_labels(tokenizer, records)
    assert predictions(checkpoint.parent) == [
        {"labels": label.strip(), "predict": answer.strip()}
        for label, answer in zip(labels, answers, strict=True)
    ]
    expected = official_scores(list(zip(answers, labels, strict=True)))
    metrics = results(checkpoint.parent, "predict")
    assert {name: metrics[f"predict_{name}"] for name in SCORES} == pytest.approx(expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_greedy_answers_of_a_quantised_base_do_not_depend_on_the_batch(
    plain, tmp_path, checkpoint, base, bits
):
    """Without a prefix, which the official script cannot."""
    run = {**plain, "quantization_bit": bits, "greedy": True}
    answers = []
    for size in (1, 7):
        assert cli.main(command({**run, "per_device_eval_batch_size": size})) == 0
        answers.append(predictions(checkpoint.parent))
    assert answers[0] == answers[1]
    assert cli.main(["quantize", str(base), str(tmp_path / "base"), "--bits", str(bits)]) == 0
    before = {**plain, "model_name_or_path": tmp_path / "base", "greedy": True}
    assert cli.main(command(before)) == 0
    assert predictions(checkpoint.parent) == answers[0]


def test_beams(flags, checkpoint, base, tokenizer, records):
    """A row at a time, padded as officially: the padding counts in the length of a beam."""
    run = {**flags, "greedy": True, "num_beams": 3, "per_device_eval_batch_size": 4}
    del run["quantization_bit"]
    assert cli.main(command(run)) == 0
    model = ChatGLM.from_pretrained(base, prefix_checkpoint=checkpoint)
    prompts = official_prompts(tokenizer, records)
    width = prompts["input_ids"].shape[1]
    answers = [
        model.generate(ids[None], mask[None], max_length=SOURCE + TARGET + 1, num_beams=3)
        for ids, mask in zip(prompts["input_ids"], prompts["attention_mask"], strict=True)
    ]
    assert [line["predict"] for line in predictions(checkpoint.parent)] == [
        text(tokenizer, ids[0, width:].tolist()).strip() for ids in answers
    ]
    assert cli.main(command({**run, "num_beams": 1, "generation_num_beams": 3})) == 0
    greedy = predictions(checkpoint.parent)
    assert (
        cli.main(
            command(
                {**{k: v for k, v in run.items() if k != "num_beams"}, "generation_num_beams": 3}
            )
        )
        == 0
    )
    assert predictions(checkpoint.parent) != greedy  # --num_beams goes before the other


def test_draws_follow_the_seed(plain, checkpoint):
    answers = []
    for change in ({}, {}, {"seed": 7}, {"greedy": True}):
        assert cli.main(command({**plain, **change})) == 0
        answers.append(predictions(checkpoint.parent))
    assert answers[0] == answers[1]
    assert answers[0] != answers[2] and answers[0] != answers[3]


@pytest.mark.parametrize("projection", [True, False])
def test_prefix_length_is_read_from_the_checkpoint(flags, checkpoint, base, projection):
    """--pre_seq_len and --prefix_projection left out are those of the checkpoint."""
    given = {**flags, "greedy": True}
    if projection:
        write_prefix(
            checkpoint,
            ChatGLM.from_pretrained(
                base, pre_seq_len=3, prefix_projection=True
            ).prefix_encoder.state_dict(),
        )
        given |= {"pre_seq_len": 3, "prefix_projection": True}
    assert cli.main(command(given)) == 0
    answers = predictions(checkpoint.parent)
    for name in ("pre_seq_len", "prefix_projection"):
        given.pop(name, None)
    assert cli.main(command(given)) == 0
    assert predictions(checkpoint.parent) == answers


def test_predict_verb_and_max_predict_samples(plain, checkpoint, capsys):
    for name in ("do_predict", "predict_with_generate"):
        del plain[name]
    assert cli.main(["predict", *command({**plain, "max_predict_samples": 2})]) == 0
    assert len(predictions(checkpoint.parent)) == 2
    assert results(checkpoint.parent, "predict")["predict_samples"] == 2
    assert "2 rows read" in capsys.readouterr().out


def test_prompts_without_room_have_empty_answers_that_count(plain, checkpoint, capsys):
    """--generation_max_length counts the padded prompt."""
    assert cli.main(command({**plain, "generation_max_length": SOURCE})) == 0
    assert [line["predict"] for line in predictions(checkpoint.parent)] == [""] * 7
    metrics = results(checkpoint.parent, "predict")
    assert [metrics[f"predict_{name}"] for name in SCORES] == [0] * 4
    assert metrics["predict_samples"] == 7
    assert "7 of 7 answers are empty and score 0" in capsys.readouterr().out


def test_prediction_without_answers(plain, checkpoint):
    for change in ({"prediction_loss_only": True}, {"predict_with_generate": False}):
        assert cli.main(command({**plain, **change})) == 0
        assert results(checkpoint.parent, "predict").keys() == names("predict", "loss")
    assert not (checkpoint.parent / "generated_predictions.txt").exists()


# Evaluation


@pytest.mark.parametrize("change", [{}, {"tokens_per_pack": 0}, {"tokens_per_pack": 100}])
def test_evaluation_loss_is_the_mean_over_batches(
    flags, checkpoint, base, tokenizer, records, change
):
    run = {
        **flags,
        "do_eval": True,
        "do_predict": False,
        "predict_with_generate": False,
        "per_device_eval_batch_size": 3,
        **change,
    }
    del run["quantization_bit"]
    assert cli.main(command(run)) == 0
    twin = diffusers_twin(ChatGLM.from_pretrained(base, prefix_checkpoint=checkpoint))
    losses = []
    for start in range(0, len(records), 3):
        batch = records[start : start + 3]
        ids = torch.zeros(len(batch), SOURCE + TARGET + 1, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        for i, record in enumerate(batch):
            prompt = tokenizer.encode(f"[Round 1]\n\n问：{record['content']}\n\n答：")[:SOURCE]
            response = tokenizer.encode(record["summary"], add_special_tokens=False)[:TARGET] + [2]
            ids[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
            labels[i, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
        with torch.no_grad():
            losses += [twin_forward(twin, ids, labels=labels)[0].item()] * len(batch)
    metrics = results(checkpoint.parent, "eval")
    assert metrics.keys() == names("eval", "loss") and metrics["eval_samples"] == 7
    assert metrics["eval_loss"] == pytest.approx(fmean(losses), rel=1e-5)


def test_training_evaluation_and_prediction_in_one_command(
    flags, plain, dev, records, checkpoint, tmp_path, capsys
):
    run = {
        **flags,
        "do_train": True,
        "do_eval": True,
        "train_file": dev,
        "greedy": True,
        "val_max_target_length": 9,
        "max_eval_samples": 4,
        "output_dir": tmp_path / "new",
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "save_steps": 3,
        "logging_steps": 1,
    }
    del run["ptuning_checkpoint"]
    assert cli.main(command(run)) == 0
    out = tmp_path / "new"
    captured = capsys.readouterr().out
    evaluated, predicted = results(out, "eval"), results(out, "predict")
    assert evaluated.keys() == {"epoch"} | names("eval", "loss", *SCORES)
    assert (evaluated["epoch"], evaluated["eval_samples"]) == (0.75, 4)
    assert predicted.keys() == names("predict", *SCORES)
    assert json.loads((out / "all_results.json").read_text()) == {
        **results(out, "train"),
        **evaluated,
        **predicted,
    }
    assert "(--val_max_target_length " in captured and "(--max_target_length " in captured
    order = [
        captured.index(f"***** {split} metrics *****") for split in ("train", "eval", "predict")
    ]
    assert order == sorted(order)
    assert "{'eval_loss': " in captured

    # What was measured is the prefix that training ended with.
    again = {
        **flags,
        "ptuning_checkpoint": out / "checkpoint-3",
        "output_dir": tmp_path / "again",
        "greedy": True,
        "val_max_target_length": 9,
    }
    assert cli.main(command(again)) == 0
    assert predictions(tmp_path / "again") == predictions(out)
    assert results(tmp_path / "again", "predict")["predict_bleu-4"] == predicted["predict_bleu-4"]
    assert torch.isfinite(read_prefix(out / "checkpoint-3")["embedding.weight"]).all()


# What goes wrong


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"test_file": "missing.json"}, "missing.json cannot be read"),
        ({"response_column": "answer"}, "has no column 'answer'"),
        ({"ptuning_checkpoint": "missing"}, "there is no prefix checkpoint missing"),
        ({"pre_seq_len": 6}, "holds 5 virtual tokens, but pre_seq_len is 6"),
        (
            {"max_target_length": 128, "max_source_length": 1024, "source_prefix": "长" * 300},
            "but the base has 256 positions; lower --max_source_length",
        ),
        ({"model_name_or_path": "missing/base"}, "missing/base"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(flags, tmp_path, capsys, changes, words):
    run = {**flags, "output_dir": tmp_path / "new", **changes}
    assert words in refused(command(run), capsys)
    assert not (tmp_path / "new").exists()


def test_prompts_that_leave_little_room_end_at_the_last_position(plain, checkpoint):
    """The official limit is above the 256 positions; the answers stop there."""
    run = {
        **plain,
        "max_source_length": 200,
        "max_target_length": 100,
        "source_prefix": "长" * 150,
        "val_max_target_length": 20,
        "max_predict_samples": 2,
    }
    assert cli.main(command(run)) == 0
    assert len(predictions(checkpoint.parent)) == 2


def test_predictions_that_cannot_be_written(plain, checkpoint, capsys):
    (checkpoint.parent / "generated_predictions.txt").mkdir()
    assert cli.main(command(plain)) == 2
    assert "cannot write" in capsys.readouterr().err
    assert not (checkpoint.parent / "predict_results.json").exists()


def test_output_folder_is_made(plain, tmp_path):
    shutil.rmtree(tmp_path / "out")
    assert cli.main(command(plain)) == 0
    assert len(predictions(tmp_path / "out")) == 7
