"""How the next token follows from scores: processors, warpers, the maximum or a draw.

The order is that of transformers 4.30.2: repetition penalty, the caller's processors, and where
tokens are drawn temperature, top_k, top_p.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# (input_ids [B, S], scores [B, V]) -> scores [B, V]
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


class InvalidScores(RuntimeError):
    """Scores hold NaN or infinity, so that no token can be drawn from them."""

    def __init__(self) -> None:
        super().__init__(
            "no token can be drawn: a row's scores hold NaN or infinity; compute in bfloat16 or "
            "float32, or check the weights of the base and of the prefix"
        )


@dataclass(frozen=True)
class Sampling:
    """The choice among a step's tokens; see make_decoder for the fields."""

    do_sample: bool = False
    top_p: float = 1.0
    top_k: int = 50
    temperature: float = 1.0
    generator: torch.Generator | None = None

    def check(self) -> None:
        """Raises ValueError for values out of range."""
        if self.do_sample and (self.temperature <= 0 or not 0 < self.top_p <= 1 or self.top_k < 0):
            raise ValueError(
                "temperature must be above 0, top_p in (0, 1] and top_k at least 0, "
                f"not {self.temperature}, {self.top_p} and {self.top_k}"
            )

    def warp(self, scores: Tensor, keep: int = 1) -> Tensor:
        """Temperature, then the top_k largest, then the smallest set whose probability exceeds
        top_p, both at least `keep` tokens; the rest of scores [B, V] becomes -inf."""
        scores = scores / self.temperature
        if self.top_k > 0:
            top_k = min(max(self.top_k, keep), scores.shape[-1])
            smallest = scores.topk(top_k).values[:, -1:]
            scores = scores.masked_fill(scores < smallest, float("-inf"))
        if self.top_p < 1:
            ascending, order = scores.sort(-1)
            dropped = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            dropped[:, -keep:] = False
            scores = scores.masked_fill(dropped.scatter(1, order, dropped), float("-inf"))
        return scores

    def draw(self, scores: Tensor, tokens: int, rows: Tensor, total: int) -> Tensor:
        """int64 [R, tokens], different tokens drawn from the softmax of scores [R, V].

        scores are those of the rows `rows` [R] out of `total`. As many random numbers are used as
        for all rows: what a row draws does not depend on which others have ended. The draw is that
        of torch.multinomial, the largest of probability / noise with exponential noise, without
        its look at the values, for which the host would wait for a GPU; see can_draw.
        """
        noise = scores.new_empty(total, scores.shape[-1]).exponential_(generator=self.generator)
        ratios = scores.softmax(-1).div_(noise.index_select(0, rows))
        return ratios.topk(tokens).indices if tokens > 1 else ratios.argmax(-1, keepdim=True)

    def choose(self, scores: Tensor, rows: Tensor, total: int) -> Tensor:
        """int64 [R], one token for each of scores [R, V]: the likeliest, or a draw."""
        if not self.do_sample:
            return scores.argmax(-1)
        return self.draw(self.warp(scores), 1, rows, total).squeeze(1)


def can_draw(scores: Tensor) -> Tensor:
    """bool [R], on the device of scores [R, V]: whether a token can be drawn for a row."""
    return scores.amax(-1).isfinite()


def penalize_repetition(
    scores: Tensor, input_ids: Tensor, starts: Tensor, penalty: float
) -> Tensor:
    """Scores [B, V] with a penalty on the tokens that a row already has (Keskar et al., 2019).

    Those are input_ids [B, S] from the column starts [B] on. Their positive scores are divided by
    `penalty`, their negative ones multiplied by it.
    """
    tokens = tokens_from(input_ids, starts)
    return scores.scatter(1, tokens, penalized(scores.gather(1, tokens), penalty))


def tokens_from(input_ids: Tensor, starts: Tensor) -> Tensor:
    """input_ids [B, S] with each row's first token, at column starts [B], in place of its padding:
    the same set of tokens as the row has without it."""
    first = input_ids.gather(1, starts.unsqueeze(1))
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    return torch.where(columns < starts.unsqueeze(1), first, input_ids)


def penalized(scores: Tensor, penalty: float) -> Tensor:
    """Scores of tokens that a row already has."""
    return torch.where(scores < 0, scores * penalty, scores / penalty)


def replace_invalid_scores(input_ids: Tensor, scores: Tensor) -> Tensor:
    """The official InvalidScoreLogitsProcessor: one NaN or infinity among the scores [B, V], and
    token 5 is certain in every row."""
    token_5 = torch.zeros_like(scores)
    token_5[:, 5] = 5e4
    return torch.where(scores.isfinite().all(), scores, token_5)


# Those that do the same to every step's scores whatever its ids, without asking for their values.
STATIC_PROCESSORS: frozenset[LogitsProcessor] = frozenset({replace_invalid_scores})
