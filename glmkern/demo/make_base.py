"""Makes what the demo ships: `python -m glmkern.demo.make_base FOLDER` (needs the test extra).

A SentencePiece model and a small GlmForCausalLM are trained on `corpus.py` and written to
FOLDER/base in the official ChatGLM2 layout; the sample goes to FOLDER/sample. It takes about ten
minutes.
"""

import argparse
import dataclasses
import importlib.util
import io
import json
import math
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glmkern.checkpoint import from_glm_state, write_base
from glmkern.demo.corpus import EXTRACTION, pretraining, sample
from glmkern.files.atomic import write_text
from glmkern.tokenizer import ChatGLMTokenizer
from glmkern.training.data.examples import Example
from glmkern.training.data.rows import IGNORE_INDEX, Row, build_training_rows

SEED = 2
THREADS = 1  # so that the weights do not depend on the number of cores
STEPS = 2000
BATCH = 16
LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
VOCABULARY = 1280  # rows of the embedding: pieces, special tokens and padding to a multiple of 64
PIECES = 1272
LONGEST_PIECE = 4  # characters; longer ones would swallow whole phrases of the grammar
TOKENIZER_EXAMPLES = 8000
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}
NAME = "glmkern-demo"
SORTED_TOGETHER = 16  # batches; rows of like length meet in a batch


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m glmkern.demo.make_base", description=__doc__)
    parser.add_argument("folder", type=Path, help="gets base/ and sample/")
    folder = parser.parse_args(argv).folder
    if importlib.util.find_spec("transformers") is None:
        parser.error("transformers is missing; install it with pip install 'glmkern[test]'")

    training_rows, held_out = sample()
    examples = list(islice(pretraining(SEED), STEPS * BATCH))
    check_disjoint(training_rows, held_out, examples)
    for name, rows in (("train.json", training_rows), ("dev.json", held_out)):
        write_text(folder / "sample" / name, json_lines(rows))

    tokenizer = train_tokenizer(examples[:TOKENIZER_EXAMPLES])
    tokenizer.save(folder / "base")
    model = train_model(rows_of(examples, tokenizer), rows_of(held_out, tokenizer))
    config, state = from_glm_state(model.state_dict(), model.config)
    config = dataclasses.replace(
        config, torch_dtype="float16", extra={"architectures": ["ChatGLMModel"]}
    )
    write_base(folder / "base", config, {name: weight.half() for name, weight in state.items()})
    return 0


def check_disjoint(*parts: Sequence[Example]) -> None:
    """Raises ValueError where two parts share goods, in whatever order, or a text."""
    seen: set[frozenset[str] | str] = set()
    for part in parts:
        found = {each for example in part for each in goods_and_texts(example)}
        if shared := seen & found:
            raise ValueError(f"{shared.pop()} is in two parts of the data; choose another seed")
        seen |= found


def goods_and_texts(example: Example) -> Iterator[frozenset[str] | str]:
    """What an exchange is about and says: attribute lists as sets, and its other texts."""
    rounds = [*example.history, (example.prompt, example.response)]
    for text in (text for each in rounds for text in each):
        yield text.removeprefix(EXTRACTION)
        for attributes in re.findall("品名#[^，：]+", text):
            yield frozenset(attributes.split("*"))


def json_lines(rows: Sequence[Example]) -> str:
    """The columns of AdvertiseGen, an object a line."""
    return "".join(
        json.dumps({"content": row.prompt, "summary": row.response}, ensure_ascii=False) + "\n"
        for row in rows
    )


def train_tokenizer(examples: Sequence[Example]) -> ChatGLMTokenizer:
    """A byte-pair model with the conventions of the official one."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines(examples),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        max_sentencepiece_length=LONGEST_PIECE,
        required_chars="0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return ChatGLMTokenizer(
        model.getvalue(),
        {
            "name_or_path": NAME,
            "remove_space": False,
            "do_lower_case": False,
            "tokenizer_class": "ChatGLMTokenizer",
        },
    )


def lines(examples: Sequence[Example]) -> Iterator[str]:
    """The lines of the chat prompts and answers; no piece can hold a newline."""
    for each in examples:
        yield "[Round 1]"
        yield f"问：{each.prompt}"
        yield f"答：{each.response}"


def rows_of(examples: Sequence[Example], tokenizer: ChatGLMTokenizer) -> list[Row]:
    limit = SHAPE["max_position_embeddings"]
    return build_training_rows(
        examples, tokenizer, max_source_length=limit, max_target_length=limit
    ).rows


def train_model(rows: Sequence[Row], held_out: Sequence[Row]) -> nn.Module:
    """A GlmForCausalLM trained on the answers; the held-out rows are only measured."""
    from transformers import GlmConfig, GlmForCausalLM

    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    model = GlmForCausalLM(
        GlmConfig(
            vocab_size=VOCABULARY,
            partial_rotary_factor=0.5,
            attention_bias=True,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=2,
            bos_token_id=None,
            **SHAPE,
        )
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)
    started, total = time.perf_counter(), 0.0
    for step, batch in enumerate(batches(rows), 1):
        loss = answer_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        total += loss.item()
        if step % 100 == 0:
            with torch.no_grad():
                unseen = answer_loss(model, held_out).item()
            seconds = time.perf_counter() - started
            print(
                f"step {step:5d}  loss {total / 100:.4f}  on the held-out sample {unseen:.4f}  "
                f"{seconds:.0f} s",
                flush=True,
            )
            total = 0.0
    return model


def learning_rate_factor(step: int) -> float:
    """Linear warm-up, then half a cosine down to 1 %."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.505 + 0.495 * math.cos(math.pi * (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS))


def batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    shuffle = random.Random(SEED).shuffle
    for start in range(0, len(rows), BATCH * SORTED_TOGETHER):
        window = sorted(
            rows[start : start + BATCH * SORTED_TOGETHER], key=lambda row: len(row.input_ids)
        )
        group = [window[i : i + BATCH] for i in range(0, len(window), BATCH)]
        shuffle(group)
        yield from group


def answer_loss(model: nn.Module, rows: Sequence[Row]) -> Tensor:
    """The mean cross entropy of the answers' tokens."""
    length = max(len(row.input_ids) for row in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for i, row in enumerate(rows):
        input_ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
        labels[i, : len(row.labels)] = torch.tensor(row.labels)
    # Causal, so padding on the right reaches no answer and needs no mask.
    hidden = model.model(input_ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != IGNORE_INDEX
    return F.cross_entropy(model.lm_head(hidden[wanted]), labels[:, 1:][wanted])


if __name__ == "__main__":
    sys.exit(main())
