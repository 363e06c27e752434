"""What every step of a generation needs, and the loop that takes one token a row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glmkern.generation.cache import KeyValueCache
from glmkern.generation.sampling import LogitsProcessor, Sampling
from glmkern.model.chatglm import ChatGLM


@dataclass(frozen=True)
class Decoder:
    """One generation.

    sampling: the choice among a step's tokens; processors: applied to its scores; ends: end tokens;
    pad: fills what is behind them; drops_rows: rows that have ended leave the running batch.
    """

    model: ChatGLM
    cache: KeyValueCache
    sampling: Sampling
    processors: Sequence[LogitsProcessor]
    ends: Sequence[int]
    pad: int
    drops_rows: bool

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [R, V] from hidden states [R, H]."""
        return self.model.transformer.output_layer.project(hidden).float()

    @torch.inference_mode()
    def process(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [R, V] after all processors."""
        for processor in self.processors:
            scores = processor(input_ids, scores)
        return scores

    def run(self, input_ids: Tensor, hidden: Tensor, max_length: int) -> Iterator[Tensor]:
        """Continues prompts [B, S], which the cache has read up to their hidden states [B, H].

        Yields int64 [B, S'], the prompts and what follows them so far, after every step. A step's
        tokens are in the cache from the next one on.
        """
        total, length = input_ids.shape
        sequences = input_ids.new_full((total, max_length), self.pad)
        sequences[:, :length] = input_ids
        ends = torch.tensor(self.ends, dtype=torch.int64, device=input_ids.device)
        rows = torch.arange(total, device=input_ids.device)  # those in the running batch
        ended = torch.zeros_like(rows, dtype=torch.bool)
        while True:
            scores = self.process(sequences[rows, :length], self.logits(hidden))
            tokens = self.sampling.choose(scores, rows, total).masked_fill(ended, self.pad)
            sequences[rows, length] = tokens
            length += 1
            ended |= torch.isin(tokens, ends)
            yield sequences[:, :length]
            going_on = int((~ended).sum())
            if length == max_length or going_on == 0:
                return
            if self.drops_rows and going_on < len(rows):
                staying = (~ended).nonzero().squeeze(1)
                self.cache.select(staying)
                rows, tokens, ended = rows[staying], tokens[staying], ended[staying]
            hidden = self.cache.read(tokens.unsqueeze(1))
