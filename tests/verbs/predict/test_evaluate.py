"""Evaluation through the command line, against the official way of doing it."""

import json
from statistics import fmean

import pytest
import torch

from bench.oracles import diffusers_twin, twin_forward
from glmkern import cli
from glmkern.chatglm import ChatGLM
from glmkern.checkpoint import read_prefix
from tests.official import command
from tests.verbs.predict.official_scores import SCORES, SOURCE, TARGET, names, predictions, results


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
