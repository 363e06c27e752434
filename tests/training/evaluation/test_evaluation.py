"""The loss and the scores of an evaluation, beside a training that goes on."""

import math

import pytest
import torch

from glmkern.errors import TrainingError
from glmkern.tokenizer import ChatGLMTokenizer
from glmkern.training.data.examples import Example, Examples
from glmkern.training.data.rows import EvaluationData
from glmkern.training.evaluation.answers import Decoding, PredictionFile
from glmkern.training.evaluation.evaluation import Evaluation
from tests.model.models import small_model


@pytest.fixture(scope="module")
def tokenizer(shared) -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(shared / "data/tokenizer")


@pytest.fixture(scope="module")
def data(tokenizer) -> EvaluationData:
    pairs = [
        ("你好", "好"),
        ("天气", "今天的天气很好。"),
        ("裙", "一件裙子，很好看"),
        ("a b", "a b c"),
    ]
    return EvaluationData.of(
        Examples(
            [Example(prompt, response, (), 2 * i) for i, (prompt, response) in enumerate(pairs)]
        ),
        tokenizer,
        max_source_length=32,
        max_target_length=16,
    )


@pytest.fixture
def model():
    return small_model({"padded_vocab_size": 64832, "hidden_size": 8, "ffn_hidden_size": 8})


def evaluation(model, tokenizer, data, **changes) -> Evaluation:
    settings = {
        "decoding": Decoding(max_length=40, batch_size=3, do_sample=True),
        "batch_size": 3,
        "token_budget": 2048,
    }
    return Evaluation(model, tokenizer, data, **{**settings, **changes})


def test_training_goes_on_as_if_nothing_had_been_measured(model, tokenizer, data):
    """Mode, gradients and every random number are as before."""
    model.train()
    state = torch.random.get_rng_state()
    measured = evaluation(model, tokenizer, data)
    first, second = measured.evaluate(), measured.evaluate()
    assert model.training and torch.equal(torch.random.get_rng_state(), state)
    assert model.prefix_encoder.embedding.weight.grad is None
    for name in ("eval_loss", "eval_bleu-4", "eval_rouge-l"):
        assert first[name] == second[name]
    model.eval()
    assert measured.evaluate()["eval_loss"] == first["eval_loss"]  # there is no dropout in it
    assert not model.training


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 9])
def test_loss_does_not_depend_on_the_packing(model, tokenizer, data, batch_size):
    losses = [
        evaluation(model, tokenizer, data, batch_size=batch_size, token_budget=budget).loss()
        for budget in (0, 30, 2048)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_loss_that_is_not_finite_is_no_number_in_a_log(model, tokenizer, data):
    with torch.no_grad():
        model.prefix_encoder.embedding.weight[0] = math.nan
    with pytest.raises(TrainingError, match="rows 0 to 6 of the evaluation: the loss is nan"):
        evaluation(model, tokenizer, data, batch_size=4).loss()


def test_memory_that_runs_out(model, tokenizer, data, monkeypatch):
    def fail(batch):
        raise torch.OutOfMemoryError("2 GiB")

    monkeypatch.setattr(model, "loss", fail)
    with pytest.raises(TrainingError, match="ran out of GPU memory; lower --tokens_per_pack"):
        evaluation(model, tokenizer, data).loss()


def test_many_batches_are_packed_in_turns(model, tokenizer, data, monkeypatch):
    whole = evaluation(model, tokenizer, data, batch_size=1).loss()
    monkeypatch.setattr("glmkern.training.evaluation.evaluation.BATCHES_PACKED_TOGETHER", 3)
    assert evaluation(model, tokenizer, data, batch_size=1).loss() == pytest.approx(whole, rel=1e-6)


class Scripted:
    """Generates what it is told, then end tokens."""

    device, training = torch.device("cpu"), False

    def __init__(self, answers: list[list[int]]):
        self.answers = iter(answers)

    def eval(self):
        pass

    def train(self, mode):
        pass

    def generate(self, input_ids, attention_mask, **options):
        answers = [next(self.answers) for _ in input_ids]
        longest = max(map(len, answers))
        padded = [[*ids, 2, *[0] * (longest - len(ids))] for ids in answers]
        return torch.cat([input_ids, torch.tensor(padded)], 1)


def test_empty_answers_score_zero_and_the_run_goes_on(tokenizer, data, tmp_path, capsys):
    replies = ["", "今天的天气很好。", " \n", "a b c"]
    scripted = Scripted([tokenizer.encode(reply, add_special_tokens=False) for reply in replies])
    path = tmp_path / "generated_predictions.txt"
    with PredictionFile(path) as file:
        metrics = evaluation(scripted, tokenizer, data).predict(file)
    assert metrics["predict_bleu-4"] == metrics["predict_rouge-l"] == 50
    assert "2 of 4 answers are empty and score 0" in capsys.readouterr().out
    assert len(path.read_text().split("\n")) == 5


def test_a_run_that_fails_leaves_whole_lines(tokenizer, data, tmp_path):
    path = tmp_path / "generated_predictions.txt"
    scripted = Scripted([[36474], [54591]])
    with pytest.raises(RuntimeError), PredictionFile(path) as file:
        evaluation(
            scripted, tokenizer, data, decoding=Decoding(max_length=40, batch_size=2)
        ).predict(file)
    assert path.read_text().count("}\n") == 2
