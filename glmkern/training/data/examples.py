"""The exchanges that a JSON or CSV file holds."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path

from glmkern.errors import InputError


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
