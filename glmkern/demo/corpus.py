"""What the base is trained on, and the sample it never sees: 243 rows to tune on, 40 held out.

The base meets every voice of the grammar in five kinds of exchange, most often the plain voice.
Where an exchange has a past round, both rounds have one style. So the base learns to use the style
of what stands before the question, as a prefix does.
"""

import random
from collections.abc import Iterator

from glmkern.demo.grammar import SAMPLE_STYLE, SIGNATURES, VOICES, Goods, Style, describe, goods
from glmkern.training.data.examples import Example

SAMPLE_SEED = 243
TRAINING_ROWS = 243
HELD_OUT_ROWS = 40
EXTRACTION = "写出属性："
PLAIN = Style("平实", "平实", "平实")


def sample() -> tuple[list[Example], list[Example]]:
    """The rows to tune on and the held-out rows, no two of them about the same goods."""
    rng = random.Random(SAMPLE_SEED)
    seen: set[frozenset] = set()
    rows: list[Example] = []
    while len(rows) < TRAINING_ROWS + HELD_OUT_ROWS:
        article = goods(rng)
        if article.identity() not in seen:
            seen.add(article.identity())
            rows.append(Example(article.prompt(), describe(article, SAMPLE_STYLE, rng)))
    return rows[:TRAINING_ROWS], rows[TRAINING_ROWS:]


def sample_identities() -> set[frozenset]:
    """The goods of the sample, whatever the order of their attributes."""
    rows = [row for part in sample() for row in part]
    return {frozenset(row.prompt.split("*")) for row in rows}


def pretraining(seed: int) -> Iterator[Example]:
    """Exchanges without end, none about goods of the sample and none in its style."""
    rng = random.Random(seed)
    kept = sample_identities()
    while True:
        yield _exchange(rng, kept)


def _exchange(rng: random.Random, kept: set[frozenset]) -> Example:
    article = _other_goods(rng, kept)
    kind = rng.random()
    if kind < 0.35:
        style = PLAIN if rng.random() < 0.5 else _style(rng)
        return Example(article.prompt(), describe(article, style, rng))
    if kind < 0.55:
        style = _style(rng)
        return Example(f"{style.cue()}：{article.prompt()}", describe(article, style, rng))
    if kind < 0.80:
        style = _style(rng)
        earlier = _other_goods(rng, kept)
        question = earlier.prompt()
        if rng.random() < 0.3:
            question = f"{style.cue()}：{question}"
        past = ((question, describe(earlier, style, rng)),)
        return Example(article.prompt(), describe(article, style, rng), past)
    if kind < 0.90:
        key, value, _ = rng.choice(article.attributes)
        return Example(f"{article.prompt()}，它的{key}是什么？", f"{value}。")
    return Example(EXTRACTION + describe(article, _style(rng), rng), article.prompt())


def _other_goods(rng: random.Random, kept: set[frozenset]) -> Goods:
    while True:
        article = goods(rng)
        if article.identity() not in kept:
            return article


def _style(rng: random.Random) -> Style:
    """One voice throughout or a mixture, at times signed; nothing of the sample's own."""
    signature = rng.choice([each for each in SIGNATURES if each != SAMPLE_STYLE.signature])
    if rng.random() < 0.6:
        signature = ""
    if rng.random() < 0.4:
        voice = rng.choice(list(VOICES))
        return Style(voice, voice, voice, signature)
    while True:
        style = Style(*rng.choices(list(VOICES), k=3), signature)
        if style.voices() != SAMPLE_STYLE.voices():
            return style
