"""Beam search and beam sampling by the rules of transformers 4.30.2.

Every prompt has K beams. A step scores their continuations by the sum of log-probabilities and
takes the best 2K, or draws as many. An end token among the first K of these makes a finished text;
the first K others are the next beams. Texts are compared by sum / length^length_penalty, where the
length counts the prompt and its padding. A prompt is done when it has K finished texts that are all
better than the best candidate now is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from glmkern.generation.decoder import Decoder, Prompts

UNUSED = -1e9  # the sum of all but a prompt's first beam, as long as they are the same


class BeamOutput(NamedTuple):
    """sequences: int64 [B, S'], prompts and what follows them; scores: what they won by, [B]."""

    sequences: Tensor
    scores: Tensor


class Finished(NamedTuple):
    """A finished text: its sum / length^length_penalty, and its ids [S'] without an end token."""

    score: float
    ids: Tensor


@dataclass
class Search:
    """The search from one prompt, number `row` of the batch.

    best: the best finished texts, the worst first; of two equals the later one comes last.
    """

    row: int
    num_beams: int
    length_penalty: float
    best: list[Finished] = field(default_factory=list)
    done: bool = False

    def add(self, ids: Tensor, total: float) -> None:
        """Takes a finished text whose log-probabilities have the sum `total`, if it is among the
        best."""
        score = self._score(total, len(ids))
        if len(self.best) < self.num_beams or score > self.best[0].score:
            self.best.append(Finished(score, ids))
            self.best = sorted(self.best, key=lambda text: text.score)[-self.num_beams :]

    def step(
        self,
        sums: list[float],
        beams: list[int],
        tokens: list[int],
        ids: Tensor,
        ends: Sequence[int],
    ) -> list[tuple[int, int, float]]:
        """The next beams as (row of ids, token, sum).

        Args:
            sums, beams, tokens: the candidates, the largest sum first; each continues a beam, a
                row of `ids`, by a token.
            ids: int64 [R * K, S'], all beams of the batch.
            ends: end tokens.
        """
        continued = []
        for rank, (total, beam, token) in enumerate(zip(sums, beams, tokens, strict=True)):
            if token not in ends:
                continued.append((beam, token, total))
            elif rank < self.num_beams:
                self.add(ids[beam].clone(), total)
            if len(continued) == self.num_beams:
                break
        self.done = len(self.best) == self.num_beams and self.best[0].score >= self._score(
            sums[0], ids.shape[1]
        )
        return continued

    def _score(self, total: float, length: int) -> float:
        return total / length**self.length_penalty


@dataclass(frozen=True)
class BeamSearch:
    """The searches of a batch, with `num_beams` beams each."""

    decoder: Decoder
    num_beams: int
    length_penalty: float = 1.0

    def run(self, prompts: Prompts, max_length: int) -> BeamOutput:
        """Continues prompts up to `max_length` ids a row."""
        decoder, cache = self.decoder, self.decoder.cache
        input_ids, starts, hidden = prompts
        rows, length = input_ids.shape
        every = torch.arange(rows, device=input_ids.device).repeat_interleave(self.num_beams)
        ids = input_ids.new_full((len(every), max_length), decoder.pad)
        ids[:, :length] = input_ids[every]
        sums = torch.zeros(rows, self.num_beams, device=ids.device)
        if not decoder.sampling.do_sample:
            sums[:, 1:] = UNUSED
        searches = [Search(row, self.num_beams, self.length_penalty) for row in range(rows)]
        running = searches
        hidden, starts = hidden[every], starts[every]
        cache.select(every)
        while True:
            scores = decoder.logits(hidden).log_softmax(-1)
            scores = decoder.process(scores, ids[:, :length], starts)
            scores = scores.unflatten(0, sums.shape) + sums.unsqueeze(-1)  # [R, K, V]
            chosen = self._step(running, scores, ids[:, :length], rows)
            if all(search.done for search in searches):
                break
            if decoder.drops_rows:
                running = [search for search in running if not search.done]
            beams, tokens, sums = (
                torch.tensor(x, device=ids.device) for x in zip(*chosen, strict=True)
            )
            sums = sums.view(-1, self.num_beams)
            ids, starts = ids[beams], starts[beams]
            ids[:, length] = tokens
            length += 1
            if length == max_length:
                break
            if beams.tolist() != list(range(len(cache.lens))):
                cache.select(beams)
            hidden = cache.read(tokens.unsqueeze(1))
        for i, search in enumerate(running):
            for beam in range(self.num_beams) if not search.done else ():
                search.add(ids[i * self.num_beams + beam, :length], float(sums[i, beam]))
        return self._best(searches, max_length)

    def _step(
        self, running: list[Search], scores: Tensor, ids: Tensor, rows: int
    ) -> list[tuple[int, int, float]]:
        """Every search's next beams, from scores [R, K, V] of all continuations."""
        vocabulary = scores.shape[-1]
        order = torch.tensor([search.row for search in running], device=scores.device)
        sums, places = self._candidates(scores, order, rows)
        beams = places // vocabulary + self.num_beams * torch.arange(
            len(running), device=scores.device
        ).unsqueeze(1)
        candidates = [x.tolist() for x in (sums, beams, places % vocabulary)]
        chosen = []
        for i, (search, *candidate) in enumerate(zip(running, *candidates, strict=True)):
            if search.done:  # kept in the batch, without effect
                chosen += [
                    (i * self.num_beams + beam, self.decoder.pad, 0.0)
                    for beam in range(self.num_beams)
                ]
                continue
            next_beams = search.step(*candidate, ids, self.decoder.ends)
            if not (search.done and self.decoder.drops_rows):
                chosen += next_beams
        return chosen

    def _candidates(self, scores: Tensor, order: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Descending sums and their places in [K * V], both [R, candidates]. There are so many that
        K are left where every end token comes first."""
        keep = max(2, 1 + len(self.decoder.ends))
        candidates = keep * self.num_beams
        sampling = self.decoder.sampling
        if not sampling.do_sample:
            return scores.flatten(1).topk(candidates)
        # The official order: warpers act on the sums, and the warped sums are kept.
        warped = sampling.warp(scores.flatten(0, 1), keep).view_as(scores).flatten(1)
        if not bool(warped.amax(1).isfinite().all()):
            raise ValueError(
                f"with beams, temperature {sampling.temperature:g} divides the sums of "
                "log-probabilities again at every step, as officially, and they have left "
                "float32's range; use temperature 1, num_beams 1 or fewer tokens"
            )
        places = sampling.draw(warped, candidates, order, rows)
        sums, descending = warped.gather(1, places).sort(-1, descending=True)
        return sums, places.gather(1, descending)

    def _best(self, searches: list[Search], max_length: int) -> BeamOutput:
        """Every search's best text, with an end token after it where there is room."""
        best, ends = [search.best[-1] for search in searches], self.decoder.ends
        longest = max(len(text.ids) for text in best)
        sequences = best[0].ids.new_full(
            (len(best), min(longest + 1, max_length)), self.decoder.pad
        )
        for row, text in zip(sequences, best, strict=True):
            row[: len(text.ids)] = text.ids
            row[len(text.ids) : len(text.ids) + 1] = ends[0] if ends else self.decoder.pad
        return BeamOutput(sequences, torch.tensor([text.score for text in best]))
