"""What a command's process is given: streams, encodings and signals, made fit to work with.

Nothing that was computed may be lost because a line could not be printed: a pipe's reader has gone,
a terminal knows ASCII alone, a log lies on a full disk. Nothing here imports JAX.
"""

import contextlib
import errno
import io
import os
import signal
import sys
from typing import Any, NoReturn, TextIO

# What they tell a shell is 128 and their number.
_ENDS = ("SIGTERM", "SIGHUP")
_ours = False  # whether this process does nothing but one command


class Terminated(KeyboardInterrupt):
    """A signal that asks the process to end, as a queue sends it before a job is killed.

    Attributes: code: the exit code, 143 for SIGTERM.
    """

    code = 128 + signal.SIGTERM


class _Outlet(io.FileIO):
    """The file of a stream; what it cannot take is dropped.

    Attributes: failed: the first error; None as long as everything was taken.
    """

    failed: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failed = self.failed or error
            return memoryview(data).nbytes


def settle(ours: bool) -> None:
    """Makes a command's surroundings fit, before it does anything.

    Text is UTF-8 wherever a library leaves the choice to the locale. stdout and stderr never raise.
    A request to end is an exception, so that what is being written gets written.

    Args: ours: whether the process does nothing but this command. It may then start itself once
        more from the command line that it was given, as file names in a locale of ASCII need.
    """
    global _ours
    if ours:
        _ours = True
        _start_in_utf8()
    _open_missing()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # nobody reads it in our place
            setattr(sys, name, _patient(stream))
    for name in _ENDS:
        number = getattr(signal, name, None)
        with contextlib.suppress(ValueError):  # outside the main thread
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _end)


def leave(code: int) -> NoReturn:
    """Exits after an interruption.

    What was computing in other threads does so still, and Python would take its memory away from
    it; so a process that is ours ends at once.
    """
    if not _ours:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def lost(stream: Any) -> str:
    """Returns why a stream of `settle` did not take all that was printed.

    It is "" where it did, and where its reader has gone: who closes a pipe wants no more.
    """
    outlet = getattr(getattr(stream, "buffer", None), "raw", None)
    failed = getattr(outlet, "failed", None)
    if failed is None or failed.errno == errno.EPIPE:
        return ""
    return os.strerror(failed.errno) if failed.errno else str(failed)


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints a line in a run that must not end by it, whatever the stream is.

    Args: stream: stdout by default.
    """
    stream = sys.stdout if stream is None else stream
    with contextlib.suppress(OSError, ValueError):  # gone, or closed
        try:
            print(text, file=stream, flush=True)
        except UnicodeEncodeError as error:
            plain = text.encode(error.encoding, "backslashreplace").decode(error.encoding)
            print(plain, file=stream, flush=True)


def _start_in_utf8() -> None:
    """Starts the same command line in Python's UTF-8 mode, where file names are not UTF-8 yet.

    Worker processes inherit the mode.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        environment = os.environ | {"PYTHONUTF8": "1"}
        with contextlib.suppress(OSError):  # where it cannot, names in ASCII still work
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _open_missing() -> None:
    """Opens closed standard streams on the null device.

    The next file to be opened would take the number of one, and what a library prints would go into
    that file.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def _patient(stream: Any) -> Any:
    """Returns a stream on the same file that takes every character, and raises nothing."""
    try:
        stream.flush()
        outlet = _Outlet(stream.fileno(), "w", closefd=False)
    except (OSError, ValueError, AttributeError):
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(outlet),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering or stream is sys.__stderr__,
        write_through=False,
    )


def _end(number: int, _: Any) -> None:
    ended = Terminated()
    ended.code = 128 + number
    raise ended
