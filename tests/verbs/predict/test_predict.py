"""Prediction through the command line, against the official way of doing it."""

import json
import shutil

import pytest

from bench.oracles import diffusers_twin
from glmkern import cli
from glmkern.chatglm import ChatGLM
from glmkern.checkpoint import write_prefix
from tests.official import command, refused
from tests.verbs.predict.official_scores import (
    SCORES,
    SOURCE,
    TARGET,
    names,
    official_greedy,
    official_labels,
    official_prompts,
    official_scores,
    predictions,
    results,
    text,
)


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
