"""samples.md: the same prompts at every save."""

from types import SimpleNamespace

import pytest
import torch

from glmkern.checkpoint import write_prefix
from glmkern.tokenizer import ChatGLMTokenizer
from glmkern.training.data.examples import Example
from glmkern.training.flags.arguments import build
from glmkern.training.output.samples import SampleWriter
from tests.training.stand_in import Echo

LIMITS = {"generation_max_length": 40, "generation_num_beams": 3, "max_source_length": 32}
EXAMPLES = [Example("你好", "好\n\n## Step 1"), Example("天气", "晴")]


class Sure(Echo):
    """Says the same token to everything; `word` can be changed, as training changes a prefix."""

    training = True
    config = SimpleNamespace(seq_length=2048)

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


def writer(folder, model, tokenizer) -> SampleWriter:
    arguments = build({**LIMITS, "output_dir": str(folder)})
    return SampleWriter(arguments, model, tokenizer, EXAMPLES)


def steps(folder) -> list[str]:
    lines = (folder / "samples.md").read_text().split("\n")
    return [line for line in lines if line.startswith("## ")]


def test_every_save_adds_greedy_answers(tokenizer, tmp_path):
    (tmp_path / "samples.md").write_text("## Step 1\nof an earlier run\n")
    model = Sure(36474)
    write = writer(tmp_path, model, tokenizer)
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
    assert all(
        options["do_sample"] is False and "num_beams" not in options
        for _, _, options in model.calls
    )


def checkpoint(folder, step: int):
    """What a save at `step` leaves of what matters here: a prefix that holds the step."""
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    write_prefix(path, {"embedding.weight": torch.full((1, 4), float(step))})
    return path


class Numbered(Sure):
    """Answers with the token whose id its prefix holds, and some."""

    def __init__(self, word: int = 36474):
        super().__init__(word)
        self.prefix_encoder = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(1, 4)})

    def generate(self, input_ids, attention_mask, **options):
        self.word = 36000 + int(self.prefix_encoder["embedding"].weight[0, 0])
        return super().generate(input_ids, attention_mask, **options)

    def reach(self, step: int) -> None:
        torch.nn.init.constant_(self.prefix_encoder["embedding"].weight, step)


@pytest.mark.parametrize("written", [1, 2, 3])
def test_a_resumed_run_has_the_sections_of_one_that_was_never_stopped(tokenizer, tmp_path, written):
    """Resumed from its second save, after which 1 to 3 sections were written."""
    saves = {step: checkpoint(tmp_path, step) for step in (5, 10, 15)}
    texts = []
    write, model = None, Numbered()
    for step, path in saves.items():
        write = write or writer(tmp_path, model, tokenizer)
        model.reach(step)
        write(path, step)
        texts.append((tmp_path / "samples.md").read_text())
    (tmp_path / "samples.md").write_text(texts[written - 1])

    model = Numbered()
    write = writer(tmp_path, model, tokenizer)
    write.resume_from(saves[10])
    if written < 3:
        assert (tmp_path / "samples.md").read_text() == texts[1]
    assert len(model.calls) == (written == 1)
    model.reach(15)
    write(saves[15], 15)
    assert (tmp_path / "samples.md").read_text() == texts[2]
    assert steps(tmp_path) == ["## Step 5", "## Step 10", "## Step 15"]


def test_a_run_resumed_in_another_folder_begins_with_the_checkpoint(tokenizer, tmp_path):
    (tmp_path / "new").mkdir()
    model = Numbered()
    writer(tmp_path / "new", model, tokenizer).resume_from(checkpoint(tmp_path, 10))
    assert steps(tmp_path / "new") == ["## Step 10"]
    assert not (tmp_path / "samples.md").exists()
