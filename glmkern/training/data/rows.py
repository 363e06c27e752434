"""From examples to rows of token ids, as the official ptuning/main.py makes them.

A training row is prompt + response + end of text. Which of its positions are learned is decided
by where they stand, never by what id they hold: a response's ids are learned even where one equals
the padding's, and so is the end of text.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from glmkern.tokenizer import ChatGLMTokenizer
from glmkern.training.data.examples import Example, Examples

IGNORE_INDEX = -100
# The official script pads evaluation prompts to the longest of each 1,000 rows of the file.
ROWS_PADDED_TOGETHER = 1000


@dataclass(frozen=True)
class Row:
    """Ids and labels of one training row, of one length and not shifted; -100 is not learned."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, kw_only=True)
class RowStatistics:
    """What became of the file's rows; lengths are in tokens."""

    rows_read: int
    skipped: int
    truncated_prompts: int
    truncated_responses: int
    longest_prompt: int
    longest_response: int

    def report(self, target_flag: str = "max_target_length") -> str:
        """The numbers in a sentence, with the flags that would keep what is cut; `target_flag` is
        the one that limits the responses."""
        used = self.rows_read - self.skipped
        parts = [
            f"{self.rows_read:,} rows read, {self.skipped:,} of them left out (the prompt or "
            f"the response is empty)"
        ]
        if self.truncated_prompts:
            parts.append(
                f"{self.truncated_prompts:,} of {used:,} prompts cut, which loses the end "
                f"of the question (--max_source_length {self.longest_prompt} keeps all)"
            )
        if self.truncated_responses:
            parts.append(
                f"{self.truncated_responses:,} of {used:,} responses cut "
                f"(--{target_flag} {self.longest_response} keeps all)"
            )
        if len(parts) == 1:
            parts.append(
                f"none cut (the longest prompt has {self.longest_prompt} tokens, the "
                f"longest response {self.longest_response})"
            )
        return "; ".join(parts)


@dataclass(frozen=True, kw_only=True)
class TrainingRows(RowStatistics):
    rows: list[Row] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class EvaluationRows(RowStatistics):
    """Prompts padded on the left (`[rows][length]` each) and unpadded reference responses."""

    input_ids: list[list[int]] = field(repr=False)
    attention_mask: list[list[int]] = field(repr=False)
    position_ids: list[list[int]] = field(repr=False)
    labels: list[list[int]] = field(repr=False)


@dataclass(frozen=True)
class EvaluationData:
    """The rows of a file in the two forms that are measured.

    Attributes:
        rows: prompt, response and end of text, as in training, for the loss. The official script
            has the prompt alone there, with labels of another length.
        prompts: for generation, with the references the answers are compared with.
    """

    examples: Sequence[Example]
    rows: TrainingRows
    prompts: EvaluationRows

    @classmethod
    def of(
        cls, examples: Sequence[Example], tokenizer: ChatGLMTokenizer, **lengths
    ) -> "EvaluationData":
        """`lengths`: max_source_length, max_target_length and source_prefix."""
        return cls(
            examples,
            build_training_rows(examples, tokenizer, **lengths),
            build_evaluation_rows(examples, tokenizer, **lengths),
        )


def build_training_rows(
    examples: Sequence[Example],
    tokenizer: ChatGLMTokenizer,
    *,
    max_source_length: int,
    max_target_length: int,
    source_prefix: str = "",
    ignore_pad_token_for_loss: bool = True,
) -> TrainingRows:
    """[gMASK] sop prompt, response, end of text; learned from the response on.

    Args:
        max_source_length: tokens kept of the prompt, [gMASK] and sop counted; its end is cut.
        max_target_length: tokens kept of the response; the end of text comes on top.
        source_prefix: put before the whole prompt.
        ignore_pad_token_for_loss: False pads every row on the right to max_source_length +
            max_target_length + 1 and trains prompt and padding as label 0, as officially.

    Raises:
        ValueError: max_source_length below 3 or max_target_length below 1.
    """
    _check_length("max_source_length", max_source_length, 3)
    _check_length("max_target_length", max_target_length, 1)
    width = max_source_length + max_target_length + 1
    rows, lengths = [], []
    for prompt, response in _encode(examples, tokenizer, source_prefix, add_special_tokens=False):
        lengths.append((len(prompt), len(response)))
        prompt = prompt[:max_source_length]
        learned = response[:max_target_length] + [tokenizer.eos_token_id]
        if ignore_pad_token_for_loss:
            rows.append(Row(prompt + learned, [IGNORE_INDEX] * len(prompt) + learned))
        else:
            pad = [tokenizer.pad_token_id]
            padding = pad * (width - len(prompt) - len(learned))
            rows.append(Row(prompt + learned + padding, pad * len(prompt) + learned + padding))
    return TrainingRows(
        rows=rows, **_statistics(examples, lengths, max_source_length, max_target_length)
    )


def build_evaluation_rows(
    examples: Sequence[Example],
    tokenizer: ChatGLMTokenizer,
    *,
    max_source_length: int,
    max_target_length: int,
    source_prefix: str = "",
) -> EvaluationRows:
    """Prompts to answer, and the responses to compare the answers with.

    The labels start with [gMASK] and sop, which count in max_target_length and decode to nothing,
    and have no end of text: so the official script makes them. It also masks the padding's id in
    them, which decodes to nothing either way.

    Raises:
        ValueError: max_source_length or max_target_length below 3.
    """
    _check_length("max_source_length", max_source_length, 3)
    _check_length("max_target_length", max_target_length, 3)
    groups: dict[int, list[list[int]]] = {}
    labels, lengths = [], []
    encoded = _encode(examples, tokenizer, source_prefix, add_special_tokens=True)
    for example, (prompt, response) in zip(examples, encoded, strict=True):
        lengths.append((len(prompt), len(response)))
        group = groups.setdefault(example.index // ROWS_PADDED_TOGETHER, [])
        group.append(prompt[:max_source_length])
        labels.append(response[:max_target_length])
    columns = {"input_ids": [], "attention_mask": [], "position_ids": []}
    for group in groups.values():
        for name, column in tokenizer.pad(group).items():
            columns[name] += column
    return EvaluationRows(
        labels=labels,
        **columns,
        **_statistics(examples, lengths, max_source_length, max_target_length),
    )


def _check_length(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(
            f"{name} must be at least {least} to keep a token of the text, not {value}"
        )


def _encode(
    examples: Iterable[Example],
    tokenizer: ChatGLMTokenizer,
    source_prefix: str,
    add_special_tokens: bool,
) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt ids, response ids) of each example, uncut; the flag is about the response."""
    for each in examples:
        prompt = source_prefix + tokenizer.build_prompt(each.prompt, each.history)
        yield tokenizer.encode(prompt), tokenizer.encode(each.response, add_special_tokens)


def _statistics(
    examples: Sequence[Example],
    lengths: list[tuple[int, int]],
    max_source_length: int,
    max_target_length: int,
) -> dict[str, int]:
    skipped = examples.skipped if isinstance(examples, Examples) else 0
    return {
        "rows_read": len(examples) + skipped,
        "skipped": skipped,
        "truncated_prompts": sum(prompt > max_source_length for prompt, _ in lengths),
        "truncated_responses": sum(response > max_target_length for _, response in lengths),
        "longest_prompt": max((prompt for prompt, _ in lengths), default=0),
        "longest_response": max((response for _, response in lengths), default=0),
    }
