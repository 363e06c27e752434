"""What the tests of the loop train: a stand-in for the model, rows, flags, and a recorder."""

from itertools import count
from types import SimpleNamespace

import torch
from torch import nn

from glmkern.training.data.rows import Row
from glmkern.training.flags.arguments import TrainingArguments
from glmkern.training.loop.trainer import Trainer

IGNORED = -100
OFFICIAL = "transformer.prefix_encoder."


class StandIn(nn.Module):
    """Eight classes scored by a trained vector; as fast as a model can be.

    Label `nan_label` gives a NaN loss, `steep_label` an infinite gradient.
    """

    nan_label, steep_label = 6, 7

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = SimpleNamespace(num_layers=3)
        self.prefix_encoder = nn.ModuleDict({"embedding": nn.Embedding(1, 8)})
        nn.init.zeros_(self.scores)
        self.dtype, self.device = dtype, torch.device("cpu")
        self.calls = []

    @property
    def scores(self) -> torch.Tensor:
        return self.prefix_encoder["embedding"].weight

    def loss(self, batch, dropout_offset, seed):
        self.calls.append(SimpleNamespace(batch=batch, offset=dropout_offset, seed=seed))
        kept = batch.labels != IGNORED
        labels = batch.labels[kept]
        nll = -self.scores[0].log_softmax(0)[labels]
        if (labels == self.nan_label).any():
            nll = nll * float("nan")
        if (labels == self.steep_label).any():
            # The derivative of sqrt at 0 is infinite, its value is not.
            nll = nll + (nll - nll.detach()).abs().sqrt()
        return (batch.token_weight[kept] * nll).sum()


def make_runs_last(seconds: float, monkeypatch) -> None:
    """Trainer's clock goes on by `seconds` between two looks; it looks before and after a run."""
    clock = SimpleNamespace(monotonic=count(100.0, seconds).__next__)
    monkeypatch.setattr("glmkern.training.loop.trainer.time", clock)


class Echo:
    """Answers a prompt with its last token, as often as there is room, and keeps the calls."""

    device = torch.device("cpu")

    def __init__(self):
        self.calls = []

    def generate(self, input_ids, attention_mask, **options):
        self.calls.append((input_ids, attention_mask, options))
        room = options["max_length"] - input_ids.shape[1]
        return torch.cat([input_ids, input_ids[:, -1:].expand(-1, room)], 1)


class Recorder(Trainer):
    """Keeps the unrounded loss of every step and the rows of every micro-batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses, self.windows = [], []
        compute_pack_losses = self.gradient._backward

        def backward(packs, offset):
            losses = compute_pack_losses(packs, offset)
            self.losses.append(sum(losses))
            return losses

        self.gradient._backward = backward

    def _take_step(self, window):
        self.windows.append([list(each) for each in window])
        super()._take_step(window)


def arguments(**flags) -> TrainingArguments:
    return TrainingArguments(**{"output_dir": "out", "disable_tqdm": True, **flags})


def simple_rows(count: int, length: int = 4) -> list[Row]:
    return [Row([1] * length, [IGNORED] + [i % 5] * (length - 1)) for i in range(count)]
