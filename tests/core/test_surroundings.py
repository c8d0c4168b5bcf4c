"""A process's surroundings: streams that nobody reads, that are closed or know ASCII alone, and
signals that ask for the end.
"""

import io
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from spear_jax.core import surroundings
from spear_jax.core.surroundings import Terminated, say
from spear_jax.experiment import command_line

ROOT = pathlib.Path(__file__).parents[2]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
SETTLED = "import sys; from spear_jax.core.surroundings import *; settle(False)\n"


def shell(line, code, **changes):
    """Runs `python -c code` in place of PROGRAM in a line of a shell, settled."""
    line = line.replace("PROGRAM", f'"{sys.executable}" -c "$CODE"')
    env = os.environ | {"PYTHONPATH": str(ROOT), "CODE": SETTLED + code} | changes
    return subprocess.run(["bash", "-c", line], env=env, capture_output=True, timeout=60)


def test_a_line_that_nobody_takes_ends_nothing(tmp_path):
    lines = "for i in range(20_000): print(i)\n"
    done = f"open({str(tmp_path / 'done')!r}, 'w').close()\n"
    told = "sys.stderr.write(repr(lost(sys.stdout)))"
    gone = shell("set -o pipefail; PROGRAM | head -1", lines + done + told)
    assert (gone.returncode, gone.stdout, gone.stderr) == (0, b"0\n", b"''")
    assert (tmp_path / "done").exists()
    full = shell("PROGRAM >/dev/full", lines + "sys.stdout.flush()\n" + told)
    assert (full.returncode, full.stderr) == (0, b"'No space left on device'")


def test_characters_that_a_stream_does_not_know_are_written_as_numbers():
    code = r"print('\xb1 gr\xf6\xdfer \udcff'); say('\xe4', sys.stderr); print('\xdf', file=sys.stderr)"
    done = shell("PROGRAM", code, **ASCII)
    assert done.returncode == 0
    assert done.stdout == b"\\xb1 gr\\xf6\\xdfer \\udcff\n" and done.stderr == b"\\xe4\n\\xdf\n"


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path):
    file = tmp_path / "file"
    code = f"""
with open({str(file)!r}, "w") as out:
    os.write(1, b"noise of a library")
    print("shown"); print("told", file=sys.stderr)
    out.write(repr((sys.stdin.read(), out.fileno() > 2)))
"""
    done = shell("PROGRAM <&- >&- 2>&-", f"import os{code}")
    assert done.returncode == 0 and file.read_text() == "('', True)"


def test_names_of_files_are_utf8_in_a_locale_of_ascii(tmp_path):
    """The command starts itself again; its worker processes inherit that."""
    program = tmp_path / "grüße an alle.py"
    program.write_text(
        "import os, sys\n"
        "from spear_jax.core.surroundings import settle\n"
        "settle(True)\n"
        "print(ascii(sys.argv[1]), sys.getfilesystemencoding(), os.environ['PYTHONUTF8'])\n",
        encoding="utf-8",
    )
    done = shell(f'"{sys.executable}" "{program}" "größer als 1"', "", **ASCII)
    assert done.stdout == b"'gr\\xf6\\xdfer als 1' utf-8 1\n", done.stderr


def test_a_request_to_end_is_an_exception_and_its_code_tells_which(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        surroundings.settle(ours=False)
        with pytest.raises(KeyboardInterrupt) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
        assert isinstance(caught.value, Terminated) and caught.value.code == 143
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "raised, code, words",
    [
        (Terminated(), 143, "stopped; what was finished is kept"),
        (KeyboardInterrupt(), 130, "stopped; what was finished is kept"),
        (KeyboardInterrupt("stopped; x has 3"), 130, "stopped; x has 3"),
        (OSError(28, "No space left on device"), 2, "error: a file cannot be read or written (No"),
        (PermissionError(13, "Permission denied", "runs/one"), 2, "error: runs/one cannot be read"),
        (Exception("File too large (os error 27)"), 2, "error: a file cannot be read or written"),
    ],
)
def test_what_ends_a_command_from_outside_is_one_line(capsys, raised, code, words):
    def main(_):
        raise raised

    with pytest.raises(SystemExit) as ended:
        command_line.run(main, [])
    told = capsys.readouterr().err
    assert ended.value.code == code and told.startswith(words) and told.count("\n") == 1


def test_a_bug_stays_a_traceback():
    def main(_):
        raise RuntimeError("a bug") from FileNotFoundError(2, "No such file", "inner")

    with pytest.raises(RuntimeError, match="a bug"):
        command_line.run(main, [])


def test_a_result_that_stdout_does_not_take_is_told(monkeypatch, capsys):
    with open("/dev/full", "wb") as full:
        raw = surroundings._Outlet(full.fileno(), "w", closefd=False)
        stream = io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8")
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as ended:
            command_line.run(lambda _: {"accuracy": 0.5}, [])
    assert ended.value.code == 2 and "No space left on device" in capsys.readouterr().err


def test_say_never_raises(tmp_path):
    with open("/dev/full", "w", encoding="ascii") as full:
        say("ä" * 10_000, full)
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # what is buffered goes there
    say("nothing", full)
