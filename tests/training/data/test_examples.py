"""Reading JSON and CSV files, and what is wrong with them."""

import csv
import io
import json
import re

import pytest

from glmkern.errors import InputError
from glmkern.training.data.examples import Example, read_examples

PAIRS = [("类型#裙,长", "第一行\n“第二行”\u2028, 同一行"), ('say "hi"', "hi\tthere"), ("95", "好")]


def as_csv(header: list[str], rows: list) -> str:
    file = io.StringIO(newline="")
    csv.writer(file).writerows([header, *rows])
    return file.getvalue()


def lines(rows: list[dict], end: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


OBJECTS = [{"content": prompt, "summary": response} for prompt, response in PAIRS]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lines.json", lines(OBJECTS)),
        ("lines.jsonl", lines(OBJECTS)),
        ("no_last_newline.json", lines(OBJECTS)[:-1]),
        ("blank_lines.json", "\n" + lines(OBJECTS, "\n  \n")),
        ("windows.json", lines(OBJECTS, "\r\n")),
        ("marked.json", "\ufeff" + lines(OBJECTS)),
        ("array.json", json.dumps(OBJECTS)),
        ("pretty_array.json", "\n" + json.dumps(OBJECTS, indent=2, ensure_ascii=False)),
        ("table.csv", as_csv(["content", "summary"], PAIRS)),
        ("TABLE.CSV", "\ufeff" + as_csv(["content", "summary"], PAIRS)),
        (
            "other_columns.csv",
            as_csv(["id", "summary", "content"], [(i, b, a) for i, (a, b) in enumerate(PAIRS)]),
        ),
        ("blank_lines.csv", as_csv(["content", "summary"], PAIRS).replace("\r\n", "\r\n\r\n")),
    ],
)
def test_formats_hold_the_same_examples(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    examples = read_examples(str(path), "content", "summary")
    assert [(each.prompt, each.response) for each in examples] == PAIRS
    assert [each.index for each in examples] == [0, 1, 2]
    assert (examples.skipped, {each.history for each in examples}) == (0, {()})


def test_history(tmp_path):
    turns = [["你好", "你好👋"], ["再见", ""]]
    histories = [turns, [], None, ""]
    rows = [{"q": "问", "a": "答", "h": history} for history in histories]
    rows.append({"q": "问", "a": "答"})
    (tmp_path / "chat.json").write_text(lines(rows))
    (tmp_path / "chat.csv").write_text(
        as_csv(["q", "a", "h"], [("问", "答", cell) for cell in (json.dumps(turns), "[]", "")])
    )
    expected = (("你好", "你好👋"), ("再见", ""))
    for name, count in (("chat.json", 5), ("chat.csv", 3)):
        examples = read_examples(tmp_path / name, "q", "a", "h")
        assert [each.history for each in examples] == [expected] + [()] * (count - 1)
    assert all(each.history == () for each in read_examples(tmp_path / "chat.json", "q", "a"))


def test_rows_without_prompt_or_response_are_counted(tmp_path):
    rows = [
        ("好", ""),
        ("好", None),
        ("", "好"),
        (0, "好"),
        (False, "好"),
        ([], 7),
        (" ", "\n"),
        ("问", "答"),
    ]
    path = tmp_path / "rows.json"
    path.write_text(lines([{"p": p, "r": r} for p, r in rows] + [{"p": "好"}]))
    examples = read_examples(path, "p", "r")
    assert list(examples) == [Example(" ", "\n", (), 6), Example("问", "答", (), 7)]
    assert examples.skipped == 7

    assert list(read_examples(path, "p", "r", max_examples=7)) == [Example(" ", "\n", (), 6)]
    (tmp_path / "short.csv").write_text("p,r\n问\n问,答\n,答\n")
    short = read_examples(tmp_path / "short.csv", "p", "r")
    assert (list(short), short.skipped) == ([Example("问", "答", (), 1)], 2)


def test_max_examples_leaves_the_rest_unread(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(lines([{"p": "问", "r": "答"}] * 2) + "{broken\n")
    assert len(read_examples(path, "p", "r", max_examples=2)) == 2
    with pytest.raises(InputError, match="line 3"):
        read_examples(path, "p", "r", max_examples=3)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        read_examples(path, "p", "r", max_examples=0)


GOOD = '{"p": "问", "r": "答", "h": []}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", GOOD, r"FILE must end in \.json or \.jsonl .* or \.csv; convert or rename it"),
        ("rows", GOOD, r"FILE must end in"),
        ("rows.json", None, "FILE cannot be read: No such file or directory; check the path"),
        (
            "rows.json",
            GOOD.encode() + "问".encode("gbk"),
            r"FILE line 2 is not UTF-8 \(byte 0xce\); save .* `iconv -f GB18030 -t UTF-8`",
        ),
        ("rows.csv", b"p,r\n\xff\xfe,x\n", r"FILE line 2 is not UTF-8 \(byte 0xff\)"),
        (
            "rows.json",
            GOOD + '{"p": "问" "r": 1}\n',
            r"FILE line 2, column 11 is not JSON \(Expecting ',' delimiter\); .* an object a line",
        ),
        (
            "rows.json",
            GOOD + "\n" + '{"p": "问',
            r"FILE line 3, column 7 is not JSON \(Unterminated string",
        ),
        ("rows.json", '[\n  {"p": "问"},\n  {"p" "问"}\n]', "FILE line 3, column 8 is not JSON"),
        ("rows.json", "[" * 100_000, "FILE line 1 cannot be read as JSON"),
        ("rows.json", '{"p": ' + "9" * 5000 + "}", "FILE line 1 cannot be read as JSON"),
        ("rows.json", "[1, 2]", r"FILE item 1 is int 1, not an object"),
        ("rows.json", '["text"]', r'FILE item 1 is str "text", not an object; write each row as'),
        ("rows.json", GOOD + '"text"\n', 'FILE line 2 is str "text", not an object'),
        (
            "rows.json",
            '{"a": "问", "b": "答"}\n{"c": 1}\n',
            "FILE has no column 'p'; its columns are 'a', 'b', 'c'",
        ),
        ("rows.csv", "p,b\n1,2\n", "FILE has no column 'r'; its columns are 'p', 'b'"),
        (
            "rows.json",
            '{"p": "问", "r": "答"}\n',
            "FILE has no column 'h'; its columns are 'p', 'r'",
        ),
        ("rows.json", json.dumps([{f"c{i}": 1 for i in range(30)}]), "'c19', ...$"),
        ("rows.json", "", "FILE has no row to use: of 0 rows none has both"),
        ("rows.json", "[]", "of 0 rows none"),
        ("rows.csv", "", "of 0 rows none"),
        ("rows.csv", "p,r\n", "of 0 rows none"),
        (
            "rows.json",
            '{"p": "", "r": "答", "h": []}\n{"p": "问", "r": null}\n',
            r"of 2 rows none has both a prompt \(column 'p'\) and a response \(column 'r'\); fill",
        ),
        (
            "rows.json",
            GOOD + '{"p": 12, "r": "答"}',
            "FILE line 2: column 'p' holds int 12, not text; put it in quotation marks",
        ),
        (
            "rows.json",
            '[{"p": "问", "r": ["答"], "h": []}]',
            r"""FILE item 1: column 'r' holds list \["答"\], not text""",
        ),
        (
            "rows.json",
            json.dumps({"p": "问", "r": {"text": "长" * 99}, "h": []}),
            r"""column 'r' holds dict \{"text": "长{27}\.\.\., not text""",
        ),
        (
            "rows.json",
            r'{"p": "问\ud83d", "r": "答", "h": []}',
            r"FILE line 1: column 'p' holds '\\ud83d', half of a surrogate pair; remove it",
        ),
        (
            "rows.json",
            '{"p": "问", "r": "答", "h": "你好"}',
            r"""FILE line 1: column 'h' holds str "你好", not a list of """
            r"""\[query, response\] pairs""",
        ),
        ("rows.json", '{"p": "问", "r": "答", "h": {"q": 1}}', "not a list of"),
        ("rows.json", '{"p": "问", "r": "答", "h": ["问", "答"]}', "not a list of"),
        ("rows.json", '{"p": "问", "r": "答", "h": [["问", "答", "问"]]}', "not a list of"),
        (
            "rows.json",
            '{"p": "问", "r": "答", "h": [["问", null]]}',
            "FILE line 1: column 'h' holds NoneType null, not text",
        ),
        ("rows.csv", "p,r,h\n问,答,你好\n", "line 2: column 'h' holds str \"你好\", not a list"),
        ("rows.csv", "p,r,h\n问,答,7\n", "line 2: column 'h' holds int 7, not a list"),
        ("rows.csv", "p,r,p\n问,答,问\n", "FILE line 1 names the column 'p' twice; rename one"),
        (
            "rows.csv",
            "p,r\n问,答\n问,答,h\n",
            "FILE line 3 has 3 cells but the header has 2; put text",
        ),
        (
            "rows.csv",
            'p,r\n问,"答\n问,答\n',
            r"FILE line 3 is not CSV \(unexpected end of data\); ch",
        ),
        ("rows.csv", 'p,r\n问,"答"x\n', "FILE line 2 is not CSV"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        read_examples(path, "p", "r", "h")
    text = str(caught.value)
    assert "\n" not in text
    assert re.search(message, text.replace(str(path), "FILE")), text
