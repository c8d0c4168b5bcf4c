"""Files: whole, in UTF-8, and disks that take no more."""

import ast
import errno
import gzip
import pathlib
import resource

import numpy as np
import pytest
from safetensors.numpy import save_file

import spear_jax
from spear_jax.analysis import runs
from spear_jax.core.errors import UserError
from spear_jax.core.files import (
    DiskError,
    disk_error,
    expanded,
    read_json_object,
    write_whole,
    writing,
)
from spear_jax.core.records import read_lines
from spear_jax.experiment.run_folder import read_run_config

FULL = pathlib.Path("/dev/full")  # every write to it is refused for want of space


@pytest.fixture
def small_disk():
    """No file may be larger than 1,000 bytes; the system then says so, as for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_is_written_whole_or_is_as_it_was(tmp_path, small_disk):
    file = tmp_path / "für alle.json"
    write_whole(file, "größer ± 1\n")
    assert file.read_bytes() == "größer ± 1\n".encode()
    with pytest.raises(DiskError, match="für alle.json cannot be written .File too large"):
        write_whole(file, "x" * 2000)
    assert file.read_bytes() == "größer ± 1\n".encode()
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda folder: (folder / "file").mkdir(), "File exists"),
        (lambda folder: (folder / "file" / "below").mkdir(), "Not a directory"),
        (lambda folder: (folder / "gone" / "below").mkdir(), "No such file"),
        (lambda folder: (folder / ("n" * 300)).touch(), "shorter name"),
        (lambda folder: FULL.write_text("x", encoding="utf-8"), "Free space"),
    ],
)
def test_what_a_disk_does_not_take_is_one_message(tmp_path, make, words):
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match=words) as caught, writing("runs/one"):
        make(tmp_path)
    assert str(caught.value).startswith("runs/one cannot be written (")
    assert "\n" not in str(caught.value)


def test_a_disk_s_error_is_found_in_those_of_libraries(tmp_path, small_disk):
    with pytest.raises(DiskError, match="cannot be written .File too large"), writing(tmp_path):
        save_file({"a": np.zeros(1000, np.float32)}, tmp_path / "a.safetensors")
    try:
        raise ValueError("a step failed") from OSError(errno.ENOSPC, "No space left on device")
    except ValueError as error:
        assert "No space left" in str(disk_error(error, "run"))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        KeyError("errno 28"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        TimeoutError(errno.ETIMEDOUT, "late"),
        OSError("without a number"),
    ],
)
def test_other_errors_stay_what_they_are(error):
    assert disk_error(error) is None
    with pytest.raises(type(error)) as caught, writing("run"):
        raise error
    assert caught.value is error


def test_a_home_that_nobody_has_is_a_users_mistake(monkeypatch):
    with pytest.raises(UserError, match="'~nobody-of-this-name/x'.*Give the whole path"):
        expanded("~nobody-of-this-name/x")
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/x") == pathlib.Path("/home/me/x")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"5", b"null", b'"x"', b"\xff\xfe{}", b"[" * 100_000, b"{\n\n]"]
)
def test_a_file_of_ours_that_is_damaged_is_one_message(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match="config.json (is not valid JSON|holds|nests)") as caught:
        read_json_object(file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    with pytest.raises(UserError, match="No such file"):
        read_json_object(tmp_path / "nothing")


@pytest.mark.parametrize(
    "content", ['{"train": 5}', '{"train": {"steps": {"a": 1}}}', '{"task": [1]}', '{"lora": null}']
)
def test_a_config_of_a_run_with_other_types_is_one_message(tmp_path, content):
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="config.json is no config of a run") as caught:
        read_run_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_traces_that_are_cut_short_are_one_message(tmp_path):
    (tmp_path / "traces").mkdir()
    whole = gzip.compress(b'{"client": 0}\n' * 1000)
    for content in (whole[:-30], b"no gzip", gzip.compress(b"{")):
        (tmp_path / "traces" / "round_00001.jsonl.gz").write_bytes(content)
        with pytest.raises(UserError, match="round_00001.jsonl.gz cannot be read"):
            runs.load_traces(tmp_path, 1)


def test_a_round_that_stands_twice_counts_once(tmp_path):
    """As two processes at once have left it."""
    file = tmp_path / "metrics.jsonl"
    rounds = [0, 1, 1, 2, 3, 2, 3]
    file.write_text(
        "".join(f'{{"round": {number}, "n": {n}}}\n' for n, number in enumerate(rounds))
        + '{"round": 4, "n',
        encoding="utf-8",
    )
    assert [(x["round"], x["n"]) for x in read_lines(file)] == [(0, 0), (1, 2), (2, 5), (3, 6)]
    file.write_bytes(file.read_bytes()[:30] + b"\xff\x00\n")
    assert [x["round"] for x in read_lines(file)] == [0]


def test_every_text_file_has_its_encoding_said():
    """So that no locale decides it."""
    left_open = []
    for file in pathlib.Path(spear_jax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and leaves_encoding(node):
                left_open.append(f"{file.name}:{node.lineno}")
    assert not left_open


def leaves_encoding(call: ast.Call) -> bool:
    """Whether a call opens, reads or writes a text and leaves its encoding to the locale."""
    said = {keyword.arg: keyword.value for keyword in call.keywords}
    if isinstance(call.func, ast.Name):
        name, owner = call.func.id, ""
    elif isinstance(call.func, ast.Attribute):
        name, owner = call.func.attr, getattr(call.func.value, "id", "")
    else:
        return False
    if name in ("read_text", "write_text"):
        return "encoding" not in said
    if "text" in said or "universal_newlines" in said:  # of subprocess
        return "encoding" not in said
    if name != "open" or owner == "os":
        return False
    default = 2 if isinstance(call.func, ast.Name) else 1  # open(file), path.open()
    if len(call.args) < default and "mode" not in said:
        return "encoding" not in said
    modes = [
        value.value
        for value in [*call.args, said.get("mode")]
        if isinstance(value, ast.Constant) and isinstance(value.value, str)
    ]
    texts = [mode for mode in modes if set(mode) <= set("rwaxt+") and mode]
    return bool(texts) and "encoding" not in said


def test_the_check_of_encodings_sees_what_it_is_for():
    wrong = """path.read_text(); path.write_text(x); path.open("a"); path.open(); open(file)
        open(file, "w"); gzip.open(file, "wt"); run(command, text=True)"""
    right = """path.read_text(encoding="utf-8"); open(file, "w", encoding="utf-8"); gzip.open(file)
        open(file, "wb"); path.open("rb"); shapes.open(name, shape); os.open(file, flags)"""
    for texts, expected in ((wrong, True), (right, False)):
        for text in texts.replace("\n", ";").split(";"):
            assert leaves_encoding(ast.parse(text.strip()).body[0].value) == expected, text
