"""How every entry point starts and ends: one JSON line as the result, one message for a user's
mistake.
"""

import argparse
import json
import logging
import os
import pathlib
import sys
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn

import ml_collections
from absl import flags
from ml_collections import config_flags

from spear_jax.core.errors import UserError, unknown
from spear_jax.experiment.config import flatten

FIELDS = "Config fields are --config.NAME=VALUE."


def run(main: Callable[[list[str]], dict[str, Any]], argv: list[str] | None = None) -> NoReturn:
    """Calls `main(argv)`, prints what it returns as the last stdout line (one JSON object), and
    exits.

    Exit codes: 0; 2 for a UserError, whose message goes to stderr alone; 130 for Ctrl-C; 1, with
    the traceback, for anything else, and for a result whose "failed" names parts that failed while
    others went on.

    Args:
        main: takes the arguments after the program's name.
        argv: those arguments; None reads the command line.
    """
    logging.getLogger("absl").setLevel(
        logging.ERROR
    )  # Orbax remarks on every save; our own output is enough
    try:
        result = main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "stopped; what was finished is kept, and the same command goes on from there",
            file=sys.stderr,
        )
        sys.exit(130)
    print(json.dumps(result), flush=True)
    sys.exit(1 if "failed" in result and result["failed"] else 0)


def parser(program: str, doc: str, examples: str) -> argparse.ArgumentParser:
    """An argument parser whose --help shows the module's docstring and examples; flags are never
    abbreviated.
    """
    return argparse.ArgumentParser(
        prog=f"python -m spear_jax.{program}",
        description=doc,
        epilog=f"examples:\n{textwrap.indent(textwrap.dedent(examples).strip(), '  ')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_offline(parser: argparse.ArgumentParser) -> None:
    """Adds --offline; `go_offline` obeys it."""
    parser.add_argument(
        "--offline", action="store_true", help="take models and datasets from disk and caches alone"
    )


def go_offline(asked: bool) -> None:
    """Where asked, keeps every library of ours from asking the network for models, datasets and
    metrics projects.

    Hugging Face's libraries read their switch once, when they are imported; it is turned in those
    that are already.
    """
    if not asked:
        return
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ.setdefault("WANDB_MODE", "offline")
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            sys.modules[name].HF_HUB_OFFLINE = True


def read_config(args: list[str], default: str = "") -> ml_collections.ConfigDict:
    """The config of `--config=FILE[:ARG]` with its `--config.a.b=VALUE` overrides.

    Args:
        args: what the program's own parser left over.
        default: FILE[:ARG] where --config is not given; "" makes it required.
    Raises: UserError for an unknown flag, file, field (naming the nearest) or a value of the wrong
        type.
    """
    named = [arg for arg in args if arg.split("=")[0] == "--config"]
    strange = [arg for arg in args if not arg.startswith("--config")]
    if strange:
        raise UserError(f"unknown argument {strange[0]!r}; run with --help for the flags. {FIELDS}")
    if not named and not default:
        raise UserError(
            "no config: give --config=FILE[:ARG], for example --config=configs/quickstart.py."
        )
    source = named[-1].partition("=")[2] if named else default
    file = source.partition(":")[0]
    if not pathlib.Path(file).is_file():
        raise UserError(
            f"no config file {file!r}; give --config=FILE[:ARG], for example "
            f"--config=configs/quickstart.py."
        )
    return apply_overrides(_load(source), [arg for arg in args if arg.split("=")[0] != "--config"])


def apply_overrides(
    config: ml_collections.ConfigDict, overrides: list[str]
) -> ml_collections.ConfigDict:
    """Sets the fields that --config.a.b=VALUE arguments name, in place, and returns the config.

    Raises: UserError for an argument of another form, an unknown field (naming the nearest) or a
        value of the wrong type.
    """
    fields = flatten(config)
    for arg in overrides:
        name = arg.partition("=")[0].removeprefix("--config.")
        if not arg.startswith("--config."):
            raise UserError(f"unknown argument {arg!r}; run with --help for the flags. {FIELDS}")
        if "=" not in arg:
            raise UserError(f"{arg!r} has no value; write it as --config.{name}=VALUE.")
        if name not in fields:
            raise unknown("config field", name, fields)
    values, argv = flags.FlagValues(), ["spear_jax", *overrides]
    config_flags.DEFINE_config_dict("config", config, "", flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(f"{' '.join(overrides)}: {error}") from error
    return config


def _load(source: str) -> ml_collections.ConfigDict:
    values, argv = flags.FlagValues(), ["spear_jax", f"--config={source}"]
    config_flags.DEFINE_config_file(
        "config", None, "", lock_config=True, flag_values=values, sys_argv=argv
    )
    try:
        values(argv)
        return values["config"].value
    except UserError:
        raise
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(f"--config={source}: {error}") from error
