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
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import ml_collections
from absl import flags
from ml_collections import config_flags

from spear_jax.core.errors import UserError, nearest, shown, unknown
from spear_jax.core.files import disk_error
from spear_jax.core.surroundings import Terminated, leave, lost, settle
from spear_jax.experiment import presets
from spear_jax.experiment.config import RENAMED, describe, flatten, import_own

FIELDS = "Config fields are --config.NAME=VALUE."
MODULE = "python -m spear_jax."  # how examples are written; shown as the user started the command
STOPPED = "stopped; what was finished is kept, and the same command goes on from there"


def run(main: Callable[[list[str]], dict[str, Any]], argv: list[str] | None = None) -> NoReturn:
    """Calls `main(argv)`, prints what it returns as the last stdout line (one JSON object), and
    exits.

    Exit codes: 0; 2 for a UserError, whose message goes to stderr alone, and for a disk that takes
    no more; 130 for Ctrl-C, 143 for SIGTERM; 1, with the traceback, for anything else, and for a
    result whose "failed" names parts that failed while others went on. A line that nobody can take
    ends nothing (`surroundings.settle`).

    Args:
        main: takes the arguments after the program's name.
        argv: those arguments; None reads the command line.
    """
    logging.getLogger("absl").setLevel(
        logging.ERROR
    )  # Orbax remarks on every save; our own output is enough
    settle(ours=argv is None)
    try:
        result = main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        _refuse(error)
    except KeyboardInterrupt as stop:
        print(str(stop) or STOPPED, file=sys.stderr)
        leave(stop.code if isinstance(stop, Terminated) else 130)
    except Exception as error:
        told = disk_error(error)
        if told is None:
            raise
        _refuse(told)
    print(json.dumps(result), flush=True)
    if why := lost(sys.stdout):
        _refuse(UserError(f"stdout did not take the result ({why}); free space, and try again."))
    sys.exit(1 if "failed" in result and result["failed"] else 0)


def _refuse(error: UserError) -> NoReturn:
    sys.stdout.flush()
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def parser(program: str, doc: str, examples: str) -> argparse.ArgumentParser:
    """An argument parser whose --help shows the module's docstring and examples; flags are never
    abbreviated.

    Args:
        program: the command's name.
        examples: commands that begin with `MODULE`; --help shows them as the user started this one,
            for example with "spear-jax ".
    """
    # `spear_jax.__main__` leaves what was typed there, "spear-jax train"
    typed = sys.argv[0].removesuffix(program) if sys.argv[0].endswith(f" {program}") else MODULE
    shown = textwrap.dedent(examples).strip().replace(MODULE, typed)
    return argparse.ArgumentParser(
        prog=f"{typed}{program}",
        description=doc,
        epilog=f"examples:\n{textwrap.indent(shown, '  ')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


class _Fields(argparse.Action):
    """--fields prints every config field with its default and its range, and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        told = describe()
        width = max(map(len, told))
        for name, rule in told.items():
            print(f"--config.{name:<{width}}  {rule}")
        parser.exit()


def add_fields(parser: argparse.ArgumentParser) -> None:
    """Adds --fields, and the fields' names to --help."""
    parser.add_argument(
        "--fields", action=_Fields, nargs=0, help="list every config field: default and range"
    )
    groups: dict[str, list[str]] = {}
    for name in describe():
        group, _, field = name.rpartition(".")
        groups.setdefault(group, []).append(field)
    lines = [
        textwrap.fill(f"{group or '(top)'}: {', '.join(names)}", 98, subsequent_indent="    ")
        for group, names in groups.items()
    ]
    listed = textwrap.indent("\n".join(lines), "  ")
    parser.epilog = f"{parser.epilog}\n\nconfig fields, --config.GROUP.FIELD=VALUE:\n{listed}"


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


def read_config(
    args: list[str], default: str = "", named: Mapping[str, presets.Preset] | None = None
) -> ml_collections.ConfigDict:
    """The config of --config=NAME[:ARG] or --config=FILE[:ARG], with its --config.a.b=VALUE
    overrides.

    Modules of --config.imports are imported first, so that a method of your own is a NAME, too.

    Args:
        args: what the program's own parser left over.
        default: NAME[:ARG] or FILE[:ARG] where --config is not given; "" makes it required.
        named: as in `load_config`.
    Raises: UserError for an unknown flag, preset, file, field (naming the nearest) or a value of
        the wrong type.
    """
    given = [arg for arg in args if arg.split("=")[0] == "--config"]
    strange = [arg for arg in args if not arg.startswith("--config")]
    if strange:
        raise UserError(
            f"unknown argument {shown(strange[0])}; run with --help for the flags. {FIELDS}"
        )
    if not given and not default:
        raise UserError(
            "no config: give --config=NAME[:ARG], for example --config=quickstart, or "
            "--config=FILE.py[:ARG]."
        )
    overrides = [arg for arg in args if arg.split("=")[0] != "--config"]
    import_named(overrides)
    source = given[-1].partition("=")[2] if given else default
    return apply_overrides(load_config(source, named), overrides)


def load_config(
    source: str, named: Mapping[str, presets.Preset] | None = None
) -> ml_collections.ConfigDict:
    """The config of a preset, or of a Python file with a `get_config`.

    ```
    load_config("spear:arc_challenge,qwen2.5-1.5b")     # a preset and its argument
    load_config("experiments/mine.py:large")            # get_config("large") of a file
    ```

    Args:
        source: NAME[:ARG] or FILE[:ARG]; an existing file comes before a preset of that name.
        named: the presets; None is `presets.named_presets()`.
    Raises: UserError where there is neither such a file nor such a preset, and for an argument that
        it does not take.
    """
    name, _, arg = source.partition(":")
    if os.path.isfile(name):  # False also for a name that no disk takes
        return _load(source)
    named = presets.named_presets() if named is None else named
    if name in named:
        return named[name](arg)
    if name.endswith(".py") or os.sep in name:
        what, guess, own = "config file", nearest(pathlib.Path(name[-200:]).stem, named), ""
    else:
        what, guess = "config", nearest(name[:200], named)
        own = (
            " A method of your own is a preset once the module of --config.imports has set "
            f"ALGORITHMS[{shown(name)}]."
        )
    listed = "" if guess else f" Presets: {', '.join(named)}."
    raise UserError(
        f"no {what} {shown(name)}.{guess}{listed} Give a preset, --config=NAME[:ARG] as in "
        f"--config=spear:arc_challenge,qwen2.5-1.5b, or a file, --config=FILE.py[:ARG].{own}"
    )


def import_named(overrides: list[str]) -> None:
    """Imports the modules that --config.imports=... names, before a preset is looked up."""
    given = [arg for arg in overrides if arg.startswith("--config.imports=")]
    import_own(apply_overrides(ml_collections.ConfigDict({"imports": ()}), given).imports)


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
            raise UserError(
                f"unknown argument {shown(arg)}; run with --help for the flags. {FIELDS}"
            )
        if "=" not in arg:
            raise UserError(f"{shown(arg)} has no value; write it as --config.{name[:80]}=VALUE.")
        if name in RENAMED:
            raise UserError(f"config field {name!r} is now {RENAMED[name]!r}; write that.")
        if name not in fields:
            raise unknown("config field", name, fields)
    # of a field that is given twice the last counts; ml_collections would join two lists
    last = list({arg.partition("=")[0]: arg for arg in overrides}.values())
    if _set_fields(config, last) is not None:  # one by one, to name the one
        for arg in last:
            if (error := _set_fields(config, [arg])) is not None:
                why = shown(str(error), 200).strip("\"'")
                raise UserError(f"{arg[:120]}: {why}") from error
    return config


def _set_fields(config: ml_collections.ConfigDict, args: list[str]) -> Exception | None:
    """Sets fields, all together: to define a flag writes the config out. Returns what went wrong."""
    values, argv = flags.FlagValues(), ["spear_jax", *args]
    config_flags.DEFINE_config_dict("config", config, "", flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except (
        flags.Error,
        TypeError,
        ValueError,
        SyntaxError,
        RecursionError,
        MemoryError,
    ) as error:
        return error
    return None


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
