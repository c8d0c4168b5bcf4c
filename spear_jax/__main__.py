"""The console script `spear-jax COMMAND ...`, and `python -m spear_jax COMMAND ...`.

A command is a file of this folder, or a folder with a `__main__.py`. So `spear-jax train` is
`python -m spear_jax.train`: the same flags, the same last line, the same exit code.
"""

import ast
import importlib
import os
import pathlib
import sys
from typing import NoReturn

from spear_jax import __version__
from spear_jax.core.errors import UserError, unknown
from spear_jax.core.surroundings import settle

# Worker processes of a command import this file again. Nothing here imports JAX.

FOLDER = pathlib.Path(__file__).parent
USAGE = """usage: {program} COMMAND [flags]

Federated self-play fine-tuning of language models from feedback, in JAX.

commands:
{commands}

examples:
  {program} train --config=quickstart --workdir=runs/quickstart
  {program} evaluate --workdir=runs/quickstart
  {program} train --help

--version prints the version. The last line of a command on stdout is one JSON object."""


def commands() -> dict[str, pathlib.Path]:
    """Returns the file of every command by its name, sorted."""
    files = {file.stem: file for file in FOLDER.glob("[!_]*.py")}
    folders = {file.parent.name: file for file in FOLDER.glob("*/__main__.py")}
    return dict(sorted((files | folders).items()))


def first_line(file: pathlib.Path) -> str:
    """Returns the first line of a file's docstring. The file is parsed, not imported."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def usage(program: str) -> str:
    """Returns the text of --help.

    Args: program: the name that the user started, as "spear-jax".
    """
    lines = (f"  {name:<11}{first_line(file)}" for name, file in commands().items())
    return USAGE.format(program=program, commands="\n".join(lines))


def main(argv: list[str] | None = None) -> NoReturn:
    """Runs a command and exits as it does; 2 for an unknown one, which names the nearest.

    Args: argv: COMMAND and its arguments; None reads the command line.
    """
    settle(ours=argv is None)
    # a file of the folder can be started by a name of its own, too
    program = "spear-jax" if sys.argv[0] != __file__ else "python -m spear_jax"
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("--help", "-h"):
        print(usage(program))
        sys.exit(0)
    if name == "--version":
        print(f"spear-jax {__version__}")
        sys.exit(0)
    known = commands()
    try:
        if not name:
            raise UserError(f"no command; give one of {', '.join(known)}, or --help.")
        if name not in known:
            raise unknown("command", name, known)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does, for modules of --config.imports
    sys.argv = [f"{program} {name}", *rest]  # what --help shows
    module = "__main__" if known[name].stem == "__main__" else ""
    command = importlib.import_module(".".join(filter(None, ("spear_jax", name, module))))
    importlib.import_module("spear_jax.experiment.command_line").run(command.main, rest)


if __name__ == "__main__":
    main()
