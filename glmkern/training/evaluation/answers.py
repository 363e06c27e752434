"""Answers to the prompts of a file, generated in batches with the official limits."""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from glmkern.chatglm import ChatGLM
from glmkern.errors import InputError, TrainingError
from glmkern.generation.sampling import InvalidScores
from glmkern.model.config import ChatGLMConfig
from glmkern.tokenizer import ChatGLMTokenizer
from glmkern.training.data.rows import EvaluationRows
from glmkern.training.flags.arguments import CUDA_GRAPHS, Arguments

# What the official script passes to generate; top_k is the default of transformers.
TOP_P, TEMPERATURE, TOP_K = 0.7, 0.95, 50
# English spacing as transformers' clean_up_tokenization_spaces mends it, in its order.
SPACINGS = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


@dataclass(frozen=True)
class Decoding:
    """How prompts are answered.

    Attributes:
        max_length: tokens of a prompt and its answer together, the prompt counted as wide as it
            is padded: to the longest of its 1,000 rows of the file, as officially.
        batch_size: prompts answered at once; greedy answers do not depend on it.
        num_beams: beams of the search; 1 is none.
        do_sample: draw from the official distribution instead of taking the likeliest token.
        seed: of the draws, which have a generator of their own.
        cuda_graphs: as generate() has it.
    """

    max_length: int
    batch_size: int
    num_beams: int = 1
    do_sample: bool = False
    seed: int = 0
    cuda_graphs: bool | None = None

    @classmethod
    def of(cls, arguments: Arguments, config: ChatGLMConfig) -> "Decoding":
        """By the official flags and --greedy, within the positions of the base."""
        _, data, training, _ = arguments
        longest = training.generation_max_length or data.padded_length
        return cls(
            max_length=min(longest, config.seq_length),
            batch_size=training.per_device_eval_batch_size,
            num_beams=data.num_beams or training.generation_num_beams or 1,
            do_sample=not training.greedy,
            seed=training.seed,
            cuda_graphs=CUDA_GRAPHS[training.cuda_graphs],
        )


def answer(model: ChatGLM, rows: EvaluationRows, decoding: Decoding) -> Iterator[list[list[int]]]:
    """Token ids of the answers, a batch at a time and in the order of the rows.

    A prompt that leaves no room below `max_length` has an empty answer.

    Raises:
        TrainingError: out of GPU memory, or scores that are not finite, with the rows.
    """
    generator = torch.Generator(model.device).manual_seed(decoding.seed)
    for batch in _batches(rows, decoding.batch_size):
        prompts = torch.tensor(rows.input_ids[batch.start : batch.stop])
        mask = torch.tensor(rows.attention_mask[batch.start : batch.stop])
        width = prompts.shape[1]
        if width >= decoding.max_length:
            yield [[] for _ in batch]
            continue
        options = {"num_beams": decoding.num_beams} if decoding.num_beams > 1 else {}
        try:
            output = model.generate(
                prompts,
                mask,
                max_length=decoding.max_length,
                do_sample=decoding.do_sample,
                top_p=TOP_P,
                top_k=TOP_K,
                temperature=TEMPERATURE,
                generator=generator,
                cuda_graphs=decoding.cuda_graphs,
                **options,
            )
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"{_span(batch)}: ran out of GPU memory; lower --per_device_eval_batch_size (now "
                f"{decoding.batch_size}) or --num_beams (now {decoding.num_beams})"
            ) from error
        except InvalidScores as error:
            raise TrainingError(
                f"{_span(batch)}: the model's scores are not finite; compute with --model_dtype "
                "bfloat16 or float32, or check the weights of the base and of the prefix"
            ) from error
        yield output[:, width:].tolist()


def _batches(rows: EvaluationRows, size: int) -> Iterator[range]:
    """Consecutive rows whose prompts are padded to one width, at most `size` at a time."""
    start = 0
    while start < len(rows.input_ids):
        end = start + 1
        while end < min(start + size, len(rows.input_ids)) and len(rows.input_ids[end]) == len(
            rows.input_ids[start]
        ):
            end += 1
        yield range(start, end)
        start = end


def _span(batch: range) -> str:
    return f"prompts {batch.start + 1:,} to {batch.stop:,}"


def decode(tokenizer: ChatGLMTokenizer, ids: Iterable[int]) -> str:
    """The text of ids, as the official metrics see it.

    Special tokens, whose names ChatGLM3's tokenizer would print, decode like padding. So do ids
    beyond the vocabulary, which an untrained model may choose.
    """
    silent = set(tokenizer.special_tokens.values())
    return tokenizer.decode(
        tokenizer.pad_token_id if token in silent or token >= tokenizer.vocab_size else token
        for token in ids
    )


def clean(text: str) -> str:
    """The text as generated_predictions.txt holds it: English spacing mended, ends stripped."""
    for spaced, mended in SPACINGS:
        text = text.replace(spaced, mended)
    return text.strip()


class PredictionFile:
    """generated_predictions.txt: a JSON object a line, {"labels": ..., "predict": ...}.

    An older file is replaced when the first line comes. Every line is written at once, so that a
    run that is killed leaves whole lines.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = None

    def write(self, predict: str, labels: str) -> None:
        """Append a line; InputError where the disk is full or the file may not be written."""
        row = {"labels": clean(labels), "predict": clean(predict)}
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        try:
            if self._file is None:
                self._file = self.path.open("wb", buffering=0)
            end = self._file.tell()
            if self._file.write(line) < len(line):
                self._file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise InputError(
                f"cannot write {self.path} ({error.strerror}); free some space or "
                "choose an --output_dir you may write to"
            ) from error

    def __enter__(self) -> "PredictionFile":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._file is not None:
            self._file.close()
