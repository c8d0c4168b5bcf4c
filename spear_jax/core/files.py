"""Files: written whole and in UTF-8, and a disk that fails is one message.

A disk may be full, read-only, failing or gone. Libraries tell of it in errors of many types;
`disk_error` finds the system's own number in them.
"""

import contextlib
import errno
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from spear_jax.core.errors import UserError, shown

# What the system says -> what to do about it.
_REMEDIES = {
    errno.ENOSPC: "Free space on its disk",
    errno.EDQUOT: "Free space, or raise the disk quota",
    errno.EFBIG: "Raise the limit of file sizes (`ulimit -f`), or free space",
    errno.EROFS: "Make its disk writable",
    errno.EACCES: "Get the right to write there",
    errno.EPERM: "Get the right to write there",
    errno.ENAMETOOLONG: "Take a shorter name",
    errno.EMFILE: "Raise the limit of open files (`ulimit -n`)",
    errno.ENOENT: "Check the path, and that its disk is there",
    errno.ENOTDIR: "Take a path whose parents are folders",
    errno.EEXIST: "Take another name",
    errno.EISDIR: "Take another name",
}
_CHECK = "Check its disk"
# The numbers that no mistake in our own code brings about.
_OF_DISKS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV,
    errno.ENXIO, errno.ENOTCONN, errno.EREMOTEIO, errno.EACCES, errno.EPERM, errno.EMFILE,
}  # fmt: skip
# TensorStore writes "[os_error_code='28']" or "[OS error 28: ...]", Rust "(os error 28)".
_NUMBER = re.compile(r"\bos[ _]error(?:_code)?[ =']*(\d+)", re.IGNORECASE)


class DiskError(UserError):
    """A file that could not be written, or a folder that is gone."""


def disk_error(error: BaseException, path: str | pathlib.Path = "") -> DiskError | None:
    """Returns the message for an error that a disk has caused; None where it is of another kind.

        disk_error(OSError(28, "No space left on device"), "run/metrics.jsonl")
        # run/metrics.jsonl cannot be written (No space left on device). Free space on its disk.

    Args:
        error: as raised.
        path: what was written; the errors that `error` was raised from count, too. Without it the
            error's own file is named, which may have been read.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, DiskError):
            return seen
        number, file = _number(seen)
        if number is not None and path:
            return _told(number, path)
        if number is not None:
            return _told(number, file, "read or written")
        seen = seen.__cause__ if path else None
    return None


def _number(error: BaseException) -> tuple[int | None, str]:
    """Returns the system's number of an error, and the file that the error names."""
    if isinstance(error, ConnectionError | TimeoutError | InterruptedError | ChildProcessError):
        return None, ""
    if isinstance(error, OSError) and error.errno is not None:
        if error.filename is None and error.errno not in _OF_DISKS:
            return None, ""
        return error.errno, os.fsdecode(error.filename) if _is_name(error.filename) else ""
    found = _NUMBER.search(str(error))
    return (int(found[1]) if found and int(found[1]) in _OF_DISKS else None), ""


def _is_name(name: object) -> bool:
    return isinstance(name, str | bytes | os.PathLike)


def _told(number: int, path: str | pathlib.Path, what: str = "written") -> DiskError:
    remedy = _REMEDIES.get(number, _CHECK)
    return DiskError(f"{path or 'a file'} cannot be {what} ({os.strerror(number)}). {remedy}.")


@contextlib.contextmanager
def writing(path: str | pathlib.Path) -> Iterator[None]:
    """Tells what the disk does not take in the block as a DiskError that names `path`.

    Libraries that raise errors of their own for it (TensorStore, safetensors) are told so, too.
    """
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        told = disk_error(error, path)
        if told is None:
            raise
        raise told from error


def write_whole(path: str | pathlib.Path, text: str) -> None:
    """Writes a text file in UTF-8: all of it, on disk, or nothing.

    Raises: DiskError where it cannot be written; what stood there before is as it was.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    with writing(path):
        try:
            with temporary.open("w", encoding="utf-8") as out:
                out.write(text)
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()  # a full disk needs the space
            raise


_AS_WRITTEN = "put it back as it was written"


LARGEST_JSON = 64 << 20  # bytes; the index of a model of a thousand layers has some megabytes


def read_json_object(path: str | pathlib.Path, remedy: str = _AS_WRITTEN) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Args: remedy: what the user may do, the end of the message.
    Raises: UserError for a file that cannot be read, is larger than LARGEST_JSON or no UTF-8, no
        JSON or no object, nested too deep, states a key twice, or a number that is not finite.
    """
    file = pathlib.Path(path)
    try:
        if file.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it has more than {LARGEST_JSON:,} bytes")
        found = json.loads(file.read_bytes().decode("utf-8"), object_pairs_hook=_fields)
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})", remedy) from error
    except RecursionError:
        raise damaged(path, "is not valid JSON (nested too deep)", remedy) from None
    except ValueError as error:
        raise damaged(path, f"is not valid JSON ({str(error)[:200]})", remedy) from error
    if not isinstance(found, dict):
        raise damaged(path, f"holds {shown(found)}, not a JSON object ({{...}})", remedy)
    return found


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    held: dict[str, Any] = {}
    for name, value in pairs:
        if name in held:
            raise ValueError(f"{shown(name)} stands twice in an object")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{shown(name)} is {value}, no finite number")
        held[name] = value
    return held


def damaged(path: str | pathlib.Path, what: str, remedy: str = _AS_WRITTEN) -> UserError:
    """Returns the error for a file that is not as it was written."""
    return UserError(f"{path} {what}; {remedy}.")


def expanded(path: str | pathlib.Path) -> pathlib.Path:
    """Returns a user's path, ~ in place of a home folder.

    Raises: UserError where there is no such home.
    """
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{str(path)[:200]!r} begins with a home folder that this machine does not know "
            f"(HOME is {os.environ.get('HOME')!r}). Give the whole path."
        ) from None
