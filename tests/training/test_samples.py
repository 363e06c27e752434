"""samples.md: the same prompts at every save."""

import pytest

from glmkern.tokenizer import ChatGLMTokenizer
from glmkern.training.dataset import Example
from glmkern.training.prediction import Decoding
from glmkern.training.samples import SampleWriter
from tests.training.test_prediction import Echo

DECODING = Decoding(max_length=40, batch_size=1, num_beams=3, do_sample=True)
EXAMPLES = [Example("你好", "好\n\n## Step 1"), Example("天气", "晴")]


class Sure(Echo):
    """Says the same token to everything; `word` can be changed, as training changes a prefix."""

    training = True

    def __init__(self, word: int):
        super().__init__()
        self.word = word

    def eval(self):
        self.training = False

    def train(self, mode):
        self.training = mode

    def generate(self, input_ids, attention_mask, **options):
        assert not self.training
        input_ids[:, -1] = self.word
        return super().generate(input_ids, attention_mask, **options)


@pytest.fixture
def tokenizer(shared) -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(shared / "data/tokenizer")


def writer(model, tokenizer, resumed=False) -> SampleWriter:
    return SampleWriter(model, tokenizer, EXAMPLES, DECODING, max_source_length=32,
                        resumed=resumed)


def steps(folder) -> list[str]:
    lines = (folder / "samples.md").read_text().split("\n")
    return [line for line in lines if line.startswith("## ")]


def test_every_save_adds_greedy_answers(tokenizer, tmp_path):
    (tmp_path / "samples.md").write_text("## Step 1\nof an earlier run\n")
    model = Sure(36474)
    write = writer(model, tokenizer)
    write(tmp_path / "checkpoint-5", 5)
    first = (tmp_path / "samples.md").read_text()
    model.word = 54591
    write(tmp_path / "checkpoint-10", 10)
    assert (tmp_path / "samples.md").read_text().startswith(first)
    assert steps(tmp_path) == ["## Step 5", "## Step 10"]
    assert "earlier run" not in first and "> 你 你 你" in first and "> 好好好" not in first
    assert "> 好好好" in (tmp_path / "samples.md").read_text()
    for text in ("`checkpoint-5`", "1. Prompt\n\n   > 你好", "2. Prompt\n\n   > 天气", "> 晴"):
        assert text in first
    assert model.training
    assert len(model.calls) == 2  # both prompts at once
    assert all(options["do_sample"] is False and "num_beams" not in options
               for _, _, options in model.calls)


def test_a_resumed_run_keeps_the_steps_before(tokenizer, tmp_path):
    write = writer(Sure(36474), tokenizer)
    for step in (5, 10, 15):
        write(tmp_path / f"checkpoint-{step}", step)
    whole = (tmp_path / "samples.md").read_text()
    resumed = writer(Sure(36474), tokenizer, resumed=True)
    resumed(tmp_path / "checkpoint-10", 10)
    assert steps(tmp_path) == ["## Step 5", "## Step 10"]
    resumed(tmp_path / "checkpoint-15", 15)
    assert (tmp_path / "samples.md").read_text() == whole
