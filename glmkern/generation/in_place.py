"""Decoding in place: every step reads and writes the same tensors and asks no value back, so that a
CUDA graph can replay it. On a CPU the same steps run without a graph.

A token of ChatGLM2-6B is some 300 launches, which take Python longer than a large GPU needs to
read the weights; a graph is one. It is captured again where a tensor is replaced: when the cache
grows, which doubles its room, and when half of the rows have ended, which then leave. Whether rows
have ended is read a few steps late, without waiting; the surplus is cut.
"""

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from glmkern.generation.decoder import Decoder, Prompts
from glmkern.generation.sampling import InvalidScores, can_draw, penalized, tokens_from

# Steps between two looks at which rows have ended. A GPU's answer is read at the next look, when it
# has long arrived: up to twice as many steps may be surplus.
LOOK_EVERY = 8
# Entries of the cache that are added at least: a capture takes as long as a few steps.
LEAST_GROWTH = 256


class InPlaceDecoding:
    """One generation: a batch of prompts that the cache has read, continued step by step.

    Attributes:
        sequences: int64 [B, max_length], the prompts, what follows them, and padding.
        length: columns of `sequences` that are filled.
    """

    @torch.inference_mode()
    def __init__(
        self, decoder: Decoder, prompts: Prompts, max_length: int, look_every: int = LOOK_EVERY
    ):
        input_ids, starts, hidden = prompts
        self.decoder, self.cache = decoder, decoder.cache
        self.max_length, self.look_every = max_length, look_every
        device = input_ids.device
        self.total, self.length = input_ids.shape
        self.sequences = input_ids.new_full((self.total, max_length), decoder.pad)
        self.sequences[:, : self.length] = input_ids
        self._ends = torch.tensor(decoder.ends, dtype=torch.int64, device=device)
        # Of the R running rows: their places in the batch, the token that each reads next, where in
        # `sequences` the next one goes, whether it has ended, and which tokens it has had.
        self._rows = torch.arange(self.total, device=device)
        self._tokens = torch.zeros_like(self._rows)
        self._places = self._rows * max_length + self.length
        self._ended = torch.zeros_like(self._rows, dtype=torch.bool)
        self._broken = torch.zeros((), dtype=torch.bool, device=device)  # no token could be drawn
        self._seen = self._tokens_of(input_ids, starts) if decoder.repetition_penalty != 1 else None
        sampling = decoder.sampling
        self._replay = Replay(device, sampling.generator if sampling.do_sample else None)
        self._choose(hidden)
        self.length += 1
        self._make_room()

    def steps(self) -> Iterator[Tensor]:
        """The prompts and what follows them so far, [B, S'], after every step."""
        while True:
            *ended, broken = self._flags().tolist()
            if broken:
                raise InvalidScores
            yield self.sequences[:, : self.length]
            if self.length == self.max_length or all(ended):
                return
            self.step()

    def finish(self) -> Tensor:
        """The prompts and all that follows them, [B, S']: up to the last row's end token."""
        start, look = self.length, self._look()
        for count in range(self.max_length - start):
            if look.is_due(count):
                *ended, broken = look.at(self._flags())
                if broken or all(ended):
                    break
                if self.decoder.drops_rows and 2 * ended.count(False) <= len(ended):
                    self._let_go(ended)
                    look = self._look()
            self.step()
        if self.decoder.sampling.do_sample and bool(self._broken):
            raise InvalidScores
        return self._without_surplus(start - 1)

    def _look(self) -> "Look":
        """Draws have no surplus: it would take random numbers that the next text should have."""
        draws = self.decoder.sampling.do_sample
        return Look(self._flags(), 1 if draws else self.look_every, late=not draws)

    @torch.inference_mode()
    def _flags(self) -> Tensor:
        """bool [R + 1]: which running rows have ended, and whether a draw has failed."""
        return torch.cat([self._ended, self._broken.unsqueeze(0)])

    def step(self) -> None:
        """One more token for each running row."""
        self._make_room()
        self._replay(self._step)
        self.cache.longest += 1
        self.length += 1

    def _make_room(self) -> None:
        """For the next token, and no more than all can need."""
        remaining = self.max_length - self.length
        growth = min(max(self.cache.longest, LEAST_GROWTH), remaining)
        if remaining and self.cache.make_room(self.cache.longest + 1, growth):
            self._replay.forget()

    @torch.inference_mode()
    def _step(self) -> None:
        """What a graph holds: from the last tokens to the next."""
        self._choose(self.cache.append(self._tokens.unsqueeze(1)))

    def _choose(self, hidden: Tensor) -> None:
        """The next token of each row from the hidden states [R, H] of its last."""
        decoder = self.decoder
        scores = decoder.logits(hidden)
        if self._seen is not None:
            had = penalized(scores, decoder.repetition_penalty)
            scores = torch.where(self._seen, had, scores)
        for processor in decoder.processors:
            scores = processor(self.sequences, scores)
        if decoder.sampling.do_sample:
            drawn = can_draw(scores).logical_or_(self._ended)
            self._broken.logical_or_(drawn.all().logical_not_())
        tokens = decoder.sampling.choose(scores, self._rows, self.total)
        self._tokens.copy_(tokens.masked_fill_(self._ended, decoder.pad))
        self.sequences.view(-1).scatter_(0, self._places, self._tokens)
        self._places.add_(1)
        self._ended.logical_or_((self._tokens.unsqueeze(1) == self._ends).any(1))
        if self._seen is not None:
            self._seen.scatter_(1, self._tokens.unsqueeze(1), True)

    @torch.inference_mode()
    def _let_go(self, ended: list[bool]) -> None:
        """Rows that have ended leave the running batch, and the cache."""
        staying = torch.tensor([i for i, end in enumerate(ended) if not end])
        staying = staying.to(self._rows.device)
        self.cache.select(staying)
        self._rows, self._tokens, self._places, self._ended = (
            x.index_select(0, staying)
            for x in (self._rows, self._tokens, self._places, self._ended)
        )
        if self._seen is not None:
            self._seen = self._seen.index_select(0, staying)
        self._replay.forget()

    def _tokens_of(self, input_ids: Tensor, starts: Tensor) -> Tensor:
        """bool [B, V]: which tokens each prompt [B, S] has, from its column `starts` on."""
        vocabulary = self.decoder.model.config.padded_vocab_size
        seen = torch.zeros(len(input_ids), vocabulary, dtype=torch.bool, device=input_ids.device)
        return seen.scatter_(1, tokens_from(input_ids, starts), True)

    def _without_surplus(self, start: int) -> Tensor:
        """`sequences` up to the last row's first end token from the column `start` on."""
        new = self.sequences[:, start : self.length]
        is_end = (new.unsqueeze(2) == self._ends).any(2)
        lengths = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, new.shape[1])
        return self.sequences[:, : start + int(lengths.max())]


class Look:
    """Looks at flags bool [R] of a GPU, every so many steps. `late`: each finds what was fetched at
    the look before while the GPU worked on; on a CPU, and else, what is there now."""

    def __init__(self, flags: Tensor, every: int, late: bool):
        self._every, self._late = every, late and flags.is_cuda
        if self._late:
            self._stream = torch.cuda.current_stream(flags.device)
            self._copy = torch.zeros(len(flags), dtype=torch.bool, pin_memory=True)
            self._arrived = torch.cuda.Event()

    def is_due(self, steps: int) -> bool:
        return steps % self._every == 0

    def at(self, flags: Tensor) -> list[bool]:
        if not self._late:
            return flags.tolist()
        self._arrived.synchronize()
        found = self._copy.tolist()
        self._copy.copy_(flags, non_blocking=True)
        self._arrived.record(self._stream)
        return found


class Replay:
    """A step that a CUDA graph repeats: the first call runs it, the second captures it. On other
    devices, and once a capture has failed in this process, every call runs it."""

    captures_fail = False

    def __init__(self, device: torch.device, generator: torch.Generator | None):
        """`generator`: where the step's random numbers come from, if not from the default one."""
        self._device, self._generator = device, generator
        self._graph: torch.cuda.CUDAGraph | None = None
        # The first run compiles kernels and makes the handles of libraries, which no graph can.
        self._warm = False

    # The step is no attribute: whose method it is would live as long as Python's collector likes,
    # with a cache and the memory of a graph.
    def __call__(self, step: Callable[[], None]) -> None:
        if self._device.type != "cuda" or Replay.captures_fail or not self._warm:
            step()
            self._warm = True
            return
        with torch.cuda.device(self._device):
            if self._graph is None and not self._capture(step):
                step()
            else:
                assert self._graph is not None
                self._graph.replay()

    def forget(self) -> None:
        """The step has other tensors: it runs, and then it is captured again."""
        self._graph, self._warm = None, False

    def _capture(self, step: Callable[[], None]) -> bool:
        """Whether there is a graph now."""
        try:
            self._graph = self._captured(step)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            Replay.captures_fail = True
            with contextlib.suppress(RuntimeError):
                self._captured(lambda: None)  # the generators leave the capture that failed
            words = f"decoding goes on without CUDA graphs, as a capture failed: {error}"
            warnings.warn(words, RuntimeWarning, stacklevel=2)
            return False
        return True

    def _captured(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        if self._generator is not None:
            graph.register_generator_state(self._generator)
        # A stream of this device: torch's own for captures is of the device that was first. The
        # current one is restored whatever happens. Nothing is collected meanwhile: the end of
        # somebody's graph or event is no part of this one; other threads may call the driver.
        stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(torch.cuda.current_stream(self._device)), _no_collection():
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                step()
        return graph


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
