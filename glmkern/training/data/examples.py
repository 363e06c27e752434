"""From a JSON or CSV file to rows of token ids, as the official ptuning/main.py makes them.

A training row is prompt + response + end of text. Which of its positions are learned is decided
by where they stand, never by what id they hold: a response's ids are learned even where one equals
the padding's, and so is the end of text.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path

from glmkern.errors import InputError
from glmkern.tokenizer import ChatGLMTokenizer

IGNORE_INDEX = -100
# The official script pads evaluation prompts to the longest of each 1,000 rows of the file.
ROWS_PADDED_TOGETHER = 1000


@dataclass(frozen=True)
class Example:
    """One exchange: past rounds of (query, response), a prompt and the response to learn."""

    prompt: str
    response: str
    history: tuple[tuple[str, str], ...] = ()
    index: int = 0  # in the file, counted from 0 with the rows that are left out


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """What a file holds, without the `skipped` rows whose prompt or response is empty."""

    examples: list[Example]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


def read_examples(
    path: str | Path,
    prompt_column: str,
    response_column: str,
    history_column: str | None = None,
    max_examples: int | None = None,
) -> Examples:
    """Reads a .json or .jsonl file (an object a line, or one array of objects) or a .csv file.

    Args:
        history_column: lists of [query, response] pairs; as JSON text in a CSV file.
        max_examples: look at no more than the file's first so many rows.

    Returns:
        The rows that have both a prompt and a response. The others are counted; a value is empty
        where Python takes it as false, or the row lacks it.

    Raises:
        InputError: the file, its form, a column or a value is not as described, with the place.
        ValueError: max_examples below 1.
    """
    path = Path(path)
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples must be at least 1, not {max_examples}")
    records = list(islice(_read_records(path), max_examples))
    wanted = [prompt_column, response_column] + ([history_column] if history_column else [])
    _check_columns(path, wanted, [record for _, record in records])

    examples = []
    for index, (place, record) in enumerate(records):
        if not record.get(prompt_column) or not record.get(response_column):
            continue
        where = f"{path} {place}"
        prompt = _text(record[prompt_column], f"{where}: column {prompt_column!r}")
        response = _text(record[response_column], f"{where}: column {response_column!r}")
        history = _history(
            record.get(history_column),
            f"{where}: column {history_column!r}",
            as_json=path.suffix.lower() == ".csv",
        )
        examples.append(Example(prompt, response, history, index))
    if not examples:
        raise InputError(
            f"{path} has no row to use: of {len(records):,} rows none has both a "
            f"prompt (column {prompt_column!r}) and a response (column "
            f"{response_column!r}); fill them in"
        )
    return Examples(examples, len(records) - len(examples))


def _read_records(path: Path) -> Iterator[tuple[str, dict]]:
    """(place in the file, row) of each row."""
    readers = {".json": _json_records, ".jsonl": _json_records, ".csv": _csv_records}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"{path} must end in .json or .jsonl (an object a line, or one array of "
            f"objects) or .csv; convert or rename it"
        )
    return reader(path, _read_text(path))


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}; check the path given for the data file"
        ) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} line {line} is not UTF-8 (byte 0x{error.object[error.start]:02x})"
            f"; save the file as UTF-8, for example with `iconv -f GB18030 -t UTF-8`"
        ) from None


def _json_records(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    if text.lstrip().startswith("["):
        for number, item in enumerate(_parse(path, text, first_line=1), 1):
            yield f"item {number}", _object(item, f"{path} item {number}")
        return
    # Not splitlines: JSON text may hold U+2028 and other characters that it takes as line ends.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            item = _parse(path, line, first_line=number)
            yield f"line {number}", _object(item, f"{path} line {number}")


def _parse(path: Path, text: str, first_line: int) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} line {first_line + error.lineno - 1}, column {error.colno} is "
            f"not JSON ({error.msg}); the file must hold an object a line, or one "
            f"array of objects"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} line {first_line} cannot be read as JSON ({error}); the file "
            f"must hold an object a line, or one array of objects"
        ) from None


def _object(item: object, where: str) -> dict:
    if not isinstance(item, dict):
        raise InputError(
            f"{where} is {_describe(item)}, not an object; write each row as "
            f'{{"column": "text", ...}}'
        )
    return item


def _csv_records(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        twice = [name for name in dict.fromkeys(header) if header.count(name) > 1]
        if twice:
            raise InputError(f"{path} line 1 names the column {twice[0]!r} twice; rename one")
        for cells in reader:
            if len(cells) > len(header):
                raise InputError(
                    f"{path} line {reader.line_num} has {len(cells)} cells but the "
                    f"header has {len(header)}; put text with commas in quotation "
                    f"marks"
                )
            if cells:
                yield f"line {reader.line_num}", dict(zip_longest(header, cells))
    except csv.Error as error:
        raise InputError(
            f"{path} line {reader.line_num} is not CSV ({error}); check its quotation "
            f"marks, each one inside a text doubled"
        ) from None


def _check_columns(path: Path, wanted: list[str], records: list[dict]) -> None:
    columns = list(dict.fromkeys(name for record in records for name in record))
    for name in wanted:
        if records and name not in columns:
            listed = ", ".join(map(repr, columns[:20])) + (", ..." if len(columns) > 20 else "")
            raise InputError(f"{path} has no column {name!r}; its columns are {listed}")


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where} holds {_describe(value)}, not text; put it in quotation marks")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} holds {value[error.start]!a}, half of a surrogate pair; remove "
            f"it or write the whole character"
        ) from None
    return value


def _history(value: object, where: str, as_json: bool) -> tuple[tuple[str, str], ...]:
    if not value:
        return ()
    if as_json:
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    pairs = value if isinstance(value, list) else [value]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise InputError(
            f"{where} holds {_describe(value)}, not a list of [query, response] "
            f'pairs; write it as [["query", "response"], ...]'
        )
    return tuple((_text(query, where), _text(response, where)) for query, response in pairs)


def _describe(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


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
