"""Writes an experiment as a Flower app, which `flwr run` starts on real devices.

The app is a folder with one file, pyproject.toml: which ClientApp and ServerApp of spear_jax to
start, and the experiment's resolved config. Server and nodes have spear_jax installed; nothing else
is sent to them. Secrets do not belong into a config.
"""

import json
import pathlib
from typing import Any

from spear_jax import __version__
from spear_jax.core.errors import UserError
from spear_jax.core.files import write_whole, writing
from spear_jax.experiment import command_line
from spear_jax.experiment.builder import build
from spear_jax.flower.terms import Terms

EXAMPLES = """
    python -m spear_jax.flower --config=quickstart --app=runs/flower/app --workdir=runs/flower/server
    flwr run runs/flower/app
"""
PYPROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "spear-jax-app"
version = "{version}"
license = "Apache-2.0"
description = "Federated fine-tuning from feedback: {method}, {task}, {model}"
dependencies = []

[tool.flwr.app]
publisher = "spear-jax"

[tool.flwr.app.components]
serverapp = "spear_jax.flower.server_app:app"
clientapp = "spear_jax.flower.client_app:app"

[tool.flwr.app.config]
experiment = {experiment}
workdir = {workdir}
deadline = {deadline}
quorum = {quorum}
"""


def main(argv: list[str]) -> dict[str, Any]:
    parser = command_line.parser("flower", __doc__, EXAMPLES)
    parser.add_argument("--app", required=True, help="the folder to write")
    parser.add_argument("--workdir", required=True, help="the run folder, on the server")
    parser.add_argument(
        "--deadline",
        type=float,
        default=Terms.deadline,
        help="seconds after which a round ends with the updates that are there (3600)",
    )
    parser.add_argument(
        "--quorum",
        type=float,
        default=Terms.quorum,
        help="the share of a cohort whose updates end a round at once (1)",
    )
    command_line.add_offline(parser)
    command_line.add_fields(parser)
    args, rest = parser.parse_known_args(argv)
    command_line.go_offline(args.offline)
    config = command_line.read_config(rest)
    workdir = str(pathlib.Path(args.workdir).expanduser().absolute())
    terms = Terms(json.dumps(config.to_dict()), workdir, args.deadline, args.quorum)
    check(config, terms.quorum)
    folder = pathlib.Path(args.app).expanduser()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "pyproject.toml", pyproject(config, terms))
    return {
        "app": str(folder),
        "workdir": workdir,
        "clients": config.federation.num_clients,
        "rounds": config.rounds,
    }


def check(config: Any, quorum: float) -> None:
    """Builds the experiment once, and raises UserError for what cannot be deployed."""
    try:
        from spear_jax.flower.server import check_deployable
    except ImportError as error:
        raise UserError(
            f'flower needs the package {error.name}; install its extra: pip install "spear-jax[flower]".'
        ) from error
    check_deployable(build(config), quorum)


def pyproject(config: Any, terms: Terms) -> str:
    """Returns the app's one file. A JSON string is a string of TOML, too."""
    return PYPROJECT.format(
        version=__version__,
        method=config.algorithm.name,
        task=config.task,
        model=pathlib.PurePath(config.model).name.replace('"', ""),
        experiment=json.dumps(terms.experiment),
        workdir=json.dumps(terms.workdir),
        deadline=terms.deadline,
        quorum=terms.quorum,
    )


if __name__ == "__main__":
    command_line.run(main)
