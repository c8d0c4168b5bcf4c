"""Local files: every cell arrives as it was written, or the file is refused with its line."""

import csv
import datetime
import decimal
import io
import json
import os
import random

import pyarrow
import pyarrow.parquet
import pytest

from spear_jax.core.errors import UserError
from spear_jax.tasks import get_task
from spear_jax.tasks.files import MAX_TEXT, read_table
from spear_jax.tasks.loading import load_examples, row_text

CELLS = (
    "4", "0.50", "007", "1e5", "01230", "1969-07-20", "2024-05-01T10:00", "None", "NA", "null",
    "nan", "True", "", "-0", "+1", "1,5", "a;b", "a\tb", 'say "so"', "two\nlines", "two\r\nlines",
    " space ", "é", "😀", "‘quoted’", "#", "'", "\\", "=1+1", "\u2028", "\x85", "\x0b",
)  # fmt: skip
PAIRS = ("prompt", "response")


def read(path, needed=PAIRS):
    return read_table([path], needed)


def refusal(path, needed=PAIRS):
    with pytest.raises(UserError) as error:
        read(path, needed)
    assert len(str(error.value)) < 700 and path.name in str(error.value)
    return str(error.value)


def csv_text(rows, separator=",", end="\r\n", quoting=csv.QUOTE_MINIMAL):
    out = io.StringIO()
    csv.writer(out, delimiter=separator, lineterminator=end, quoting=quoting).writerows(rows)
    return out.getvalue()


# --- CSV: Python's own writer is the oracle ---


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_every_cell_of_a_csv_file_arrives_as_written(tmp_path, separator, end, quoting):
    rng = random.Random(separator + end + str(quoting))
    rows = [["prompt", "response", "note"]]
    rows += [[rng.choice(CELLS) for _ in range(3)] for _ in range(300)]
    path = tmp_path / "cells.csv"
    path.write_bytes(csv_text(rows, separator, end, quoting).encode())
    table = read(path)
    assert table.columns == rows[0]
    assert [list(row.values()) for row in table.rows] == rows[1:]


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_encodings_that_can_be_told_are_read(tmp_path, encoding, kind):
    rows = [{"prompt": f"Café {i}", "response": "naïve 😀 01230"} for i in range(5)]
    text = csv_text([PAIRS, *(row.values() for row in rows)])
    if kind == "jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path = tmp_path / f"text.{kind}"
    path.write_bytes(text.encode(encoding))
    assert read(path).rows == rows


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "cp1251", "shift-jis"])
def test_other_encodings_are_refused_with_line_byte_and_remedy(tmp_path, encoding):
    word = {"cp1251": "Привет", "shift-jis": "日本語"}.get(encoding, "café")
    path = tmp_path / "old.csv"
    path.write_bytes(f"prompt,response\na,b\na,{word}\n".encode(encoding))
    first = next(byte for byte in word.encode(encoding) if byte > 127)
    said = refusal(path)
    assert f"byte 0x{first:02X} in line 3 is not UTF-8" in said and "Save the file as UTF-8" in said


def test_tsv_is_parted_by_tabs_whatever_its_header_holds(tmp_path):
    path = tmp_path / "table.tsv"
    path.write_text("prompt\tresponse, or reply; or both\n1,2\t3;4\n")
    assert read(path).rows == [{"prompt": "1,2", "response, or reply; or both": "3;4",
                                "response": None}]  # fmt: skip


def test_separator_is_the_one_by_which_the_needed_columns_are_there(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("prompt;response;a, b, c, d\n1,5;2,5;x\n")
    assert read(path).rows == [{"prompt": "1,5", "response": "2,5", "a, b, c, d": "x"}]


def test_empty_lines_are_no_rows_and_columns_without_a_name_are_left_out(tmp_path):
    path = tmp_path / "sheet.csv"
    path.write_text(",prompt,response,,\n0,a,b,,\n\n1,c,d,,\n\n")
    table = read(path)
    assert table.columns == ["prompt", "response"]
    assert [tuple(row.values()) for row in table.rows] == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize(
    "text, said",
    [
        ("prompt,response\na,b\na,b,c\n", "row in line 3 has 3 cells, but the header has 2"),
        ('prompt,response\n"a\n1",b\na\n', "row in line 4 has 1 cells, but the header has 2"),
        ("prompt,response,prompt\na,b,c\n", "names column 'prompt' twice (cells 1 and 3)"),
        ('prompt,response\na,b\nc,"d\ne,f\n', "row in line 3 opens a quote that is never closed"),
        ('prompt,response\na,"b"c\n', "row in line 2 has a quoted cell with more text behind"),
        ('prompt,response\na,"b \\"c\\""\n', "row in line 2 has a quoted cell with more text"),
        ("prompt,response\na,b\na\0,b\n", "line 3 holds a NUL"),
        ("prompt," * 20_000 + "\na,b\n", "line 1 names 20,001 columns, more than 10,000"),
        ("prompt,response\na," + "x" * (MAX_TEXT + 1), "line 2 has a cell of more than 1,000,000"),
        ("x" * 20_000_000, "line 1 has a cell of more than 1,000,000 characters"),
    ],
)
def test_broken_csv_is_refused_with_its_line(tmp_path, text, said):
    path = tmp_path / "broken.csv"
    path.write_text(text)
    assert said in refusal(path)
    assert csv.field_size_limit() == 131072  # Python's own default stands again


# --- JSON: Python's own reader is the oracle ---


def test_every_value_of_json_arrives_as_written_in_all_layouts(tmp_path):
    rng = random.Random(0)
    rows = [
        {"prompt": rng.choice(CELLS), "response": rng.choice(CELLS), "n": rng.choice([4, None, True])}
        for _ in range(200)
    ]  # fmt: skip
    lines = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
    layouts = {
        "lines.jsonl": "\n".join(lines),
        "lines.json": "\r\n\r\n".join(lines) + "\n",
        "list.json": json.dumps(rows),
        "list.jsonl": json.dumps(rows, indent=1),
        "pretty.json": "\n".join(json.dumps(row, indent=2) for row in rows),
    }
    for name, text in layouts.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        assert read(tmp_path / name).rows == rows, name


@pytest.mark.parametrize(
    "written", ["4", "0.50", "1e5", "-1.0", "1E400", "0.1000", "true", "false"]
)
def test_a_number_of_json_becomes_the_text_in_the_file(tmp_path, written):
    path = tmp_path / "number.jsonl"
    path.write_text(f'{{"prompt": {written}, "response": "x"}}')
    assert row_text(read(path).rows[0], "prompt", 0) == written


def test_rows_may_hold_other_keys_and_lists_of_other_types(tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"prompt": 1, "x": [1, "a"]}\n{"response": "b", "x": {"y": null}}\n')
    assert read(path).columns == ["prompt", "x", "response"]
    assert read(path).rows == [
        {"prompt": 1, "x": [1, "a"], "response": None},
        {"prompt": None, "x": {"y": None}, "response": "b"},
    ]


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"a": 1}\n{"a" 2}\n', "line 2 is no JSON: Expecting ':' delimiter (line 2, column 6)"),
        ('{"a": 1}\n{"a": 2\n{"a": 3}\n', "starts in line 2 is no JSON"),
        ('{"a": 1},\n{"a": 2}\n', "line 1, column 9"),
        ('\n\n{"a": 1, "b": {"c": 1, "c": 2}}', "line 3 holds an object that names 'c' twice"),
        ('{"a": NaN}', "line 1 holds NaN"),
        ('{"a": [-Infinity]}', "line 1 holds -Infinity"),
        ('{"a": 1}\n[1]\n', "line 2 holds [1], but an object"),
        ('[{"a": 1}, "b"]', "item 1 (from 0) holds 'b', but an object"),
        ("5", "line 1 holds 5, but an object"),
        ('{"a": 1}\n{"a": ' + "[" * 100_000, "line 2 is nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "line 1 holds a number of thousands of digits"),
        ('{"a": "\\ud83d"}', "line 1 holds \\ud83d, which is half a character"),
        ('{"a": "\0"}', "line 1 holds a NUL"),
        ("x" * 20_000_000, "line 1 is no JSON"),
    ],
    ids=range(14),
)
def test_broken_json_is_refused_with_its_line(tmp_path, text, said):
    path = tmp_path / "broken.jsonl"
    path.write_text(text)
    assert said in refusal(path)


def test_an_object_around_the_list_is_refused_with_the_lists_name(tmp_path):
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": 1, "data": [{"prompt": "a", "response": "b"}] * 3}))
    with pytest.raises(UserError, match="'data' holds a list of 3 objects: save that list alone"):
        load_examples(get_task("pairs"), "train", str(path))


# --- parquet: typed columns stay ---


def test_typed_columns_of_parquet_keep_their_values(tmp_path):
    row = {
        "text": "01230", "int": 4, "float": 0.5, "bool": True, "none": None, "list": ["a", None],
        "turns": [{"role": "user", "content": "x"}], "date": datetime.date(2024, 5, 1),
        "decimal": decimal.Decimal("0.50"),
    }  # fmt: skip
    folder = tmp_path / "year=2024"  # no column of its own
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 3), folder / "typed.parquet")
    table = read(folder / "typed.parquet", ())
    assert table.columns == list(row) and table.rows == [row] * 3
    texts = {name: row_text(row, name, 0) for name in ("int", "float", "bool", "date", "decimal")}
    assert list(texts.values()) == ["4", "0.5", "true", "2024-05-01", "0.50"]


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), b"bytes", ["a"], {"a": 1}, "x" * (MAX_TEXT + 1)]
)
def test_what_is_no_text_is_refused(value):
    with pytest.raises(UserError, match="row 7: column 'q' holds") as error:
        row_text({"q": value}, "q", 7)
    assert len(str(error.value)) < 400


def test_damaged_parquet_and_a_column_that_stands_twice_are_refused(tmp_path):
    path = tmp_path / "whole.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "a"}] * 9), path)
    (tmp_path / "part.parquet").write_bytes(path.read_bytes()[:-9])
    assert "cannot be read as .parquet" in refusal(tmp_path / "part.parquet")
    twice = pyarrow.table([[1], [2]], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    assert "a column stands twice" in refusal(tmp_path / "twice.parquet")


# --- from a path to examples ---


def test_a_replaced_file_is_read_anew_and_nothing_is_written_beside_it(tmp_path):
    path = tmp_path / "train.csv"
    for reply in ("old", "new"):
        path.write_text(f"prompt,response\nWhat?,{reply}\n")
        os.utime(path, (1e9, 1e9))
        (example,) = load_examples(get_task("pairs"), "train", str(tmp_path))
        assert example.response == reply
    assert [file.name for file in tmp_path.iterdir()] == ["train.csv"]


def test_shards_are_read_in_order_and_share_their_columns(tmp_path):
    (tmp_path / "train-1.csv").write_text("prompt,response\na,1\n")
    (tmp_path / "train-2.csv").write_text("response;prompt\n2;b\n")
    examples = load_examples(get_task("pairs"), "train", str(tmp_path))
    assert [(e.id, e.question, e.response) for e in examples] == [("0", "a", "1"), ("1", "b", "2")]


def test_a_path_that_cannot_be_opened_is_named(tmp_path):
    fifo = tmp_path / "pipe.csv"
    os.mkfifo(fifo)
    for path in (str(fifo), "x" * 5000, "~nobody-of-this-name/x", "a\0b"):
        told = r"data path '.*(cannot be opened|neither|not exist)|home folder that this machine"
        with pytest.raises(UserError, match=told):
            load_examples(get_task("pairs"), "train", path)


def test_a_csv_file_serves_a_task_of_true_and_false(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("qid,question,answer,facts\n1,Is it?,True,It is.\n2,Is it?,false,\n")
    examples = load_examples(get_task("strategy_qa"), "train", str(tmp_path))
    assert [e.labels[e.gold] for e in examples] == ["yes", "no"]
    assert [e.support for e in examples] == [("It is.",), ()]
