"""What every step of a generation needs, and the loop that takes one token a row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from glmkern.generation.cache import KeyValueCache
from glmkern.generation.sampling import (
    InvalidScores,
    LogitsProcessor,
    Sampling,
    can_draw,
    penalize_repetition,
)
from glmkern.model.model import ChatGLMModel


class Prompts(NamedTuple):
    """A batch that the cache has read: input_ids int64 [B, S]; starts int64 [B], where each row's
    padding ends; hidden [B, H], the hidden states of the last tokens."""

    input_ids: Tensor
    starts: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class Decoder:
    """One generation.

    sampling: the choice among a step's tokens.
    repetition_penalty, processors: applied to the scores before that choice.
    ends: end tokens; pad: fills a row after its end token.
    drops_rows: rows that have ended leave the running batch.
    in_place: steps are those of in_place.py, which a CUDA graph can repeat.
    """

    model: ChatGLMModel
    cache: KeyValueCache
    sampling: Sampling
    repetition_penalty: float
    processors: Sequence[LogitsProcessor]
    ends: Sequence[int]
    pad: int
    drops_rows: bool
    in_place: bool

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [R, V] from hidden states [R, H]."""
        return self.model.transformer.output_layer.project(hidden).float()

    @torch.inference_mode()
    def process(self, scores: Tensor, input_ids: Tensor, starts: Tensor) -> Tensor:
        """scores [R, V] after the penalty and all processors; input_ids [R, S'] and starts [R] are
        those of the same rows."""
        if self.repetition_penalty != 1:
            scores = penalize_repetition(scores, input_ids, starts, self.repetition_penalty)
        for processor in self.processors:
            scores = processor(input_ids, scores)
        return scores

    def run(self, prompts: Prompts, max_length: int) -> Iterator[Tensor]:
        """Continues prompts up to `max_length` ids a row.

        Yields int64 [B, S'], the prompts and what follows them so far, after every step. A step's
        tokens are in the cache from the next one on.
        """
        input_ids, starts, hidden = prompts
        total, length = input_ids.shape
        sequences = input_ids.new_full((total, max_length), self.pad)
        sequences[:, :length] = input_ids
        ends = torch.tensor(self.ends, dtype=torch.int64, device=input_ids.device)
        rows = torch.arange(total, device=input_ids.device)  # those in the running batch
        ended = torch.zeros_like(rows, dtype=torch.bool)
        while True:
            scores = self.process(self.logits(hidden), sequences[rows, :length], starts[rows])
            if self.sampling.do_sample and not bool((can_draw(scores) | ended).all()):
                raise InvalidScores
            tokens = self.sampling.choose(scores, rows, total).masked_fill(ended, self.pad)
            sequences[rows, length] = tokens
            length += 1
            ended |= torch.isin(tokens, ends)
            yield sequences[:, :length]
            running = int((~ended).sum())
            if length == max_length or running == 0:
                return
            if self.drops_rows and running < len(rows):
                staying = (~ended).nonzero().squeeze(1)
                self.cache.select(staying)
                rows, tokens, ended = rows[staying], tokens[staying], ended[staying]
            hidden = self.cache.read(tokens.unsqueeze(1))
