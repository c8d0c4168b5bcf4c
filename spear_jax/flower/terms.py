"""What a run config and a node config of Flower say.

The ClientApp reads them without JAX, which is imported where a config of the experiment is made.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from spear_jax.core.errors import UserError, shown

if TYPE_CHECKING:
    import ml_collections

# config fields that a node may set for itself: its data, its copy of the model, who comments
OF_NODES = ("data.path", "model", "rollout.feedback")
# all that a server is told of a mistake on a node: the message may quote the node's files
WRONG_NODE = "the node is set up wrongly; its log says how"


@dataclasses.dataclass(frozen=True)
class Terms:
    """How the server runs an experiment; the app's config, in this order.

    Attributes:
        experiment: the resolved config, JSON.
        workdir: the run folder, on the server.
        deadline: seconds after which a round ends with the updates that are there.
        quorum: the share of a cohort whose updates end a round at once.
    """

    experiment: str
    workdir: str
    deadline: float = 3600.0
    quorum: float = 1.0

    def __post_init__(self):
        if not self.deadline > 0:
            raise UserError(f"deadline is {self.deadline:g}; give seconds above 0.")
        if not 0 < self.quorum <= 1:
            raise UserError(f"quorum is {self.quorum:g}; give a share above 0, up to 1.")

    @classmethod
    def read(cls, run_config: Mapping[str, Any]) -> "Terms":
        """Reads Flower's run config. Raises: UserError for one that `spear-jax flower` did not
        write.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if missing := names - run_config.keys():
            raise UserError(
                f"the app's config has no {min(missing)}; write the app with `spear-jax flower`."
            )
        deadline, quorum = float(run_config["deadline"]), float(run_config["quorum"])
        return cls(str(run_config["experiment"]), str(run_config["workdir"]), deadline, quorum)

    def config(self) -> "ml_collections.ConfigDict":
        """Returns the experiment's config."""
        from spear_jax.experiment.run_folder import config_of

        return config_of(json.loads(self.experiment), pathlib.Path("pyproject.toml"))


def client_of(node_config: Mapping[str, Any]) -> int:
    """Returns the id of the client that a node is. Raises: UserError."""
    client = node_config.get("client")
    if not isinstance(client, int) or client < 0:
        raise UserError(
            f"the node's client is {shown(client)}; start flower-supernode with --node-config "
            "'client=0 folder=\"nodes/0\"', and another number for each node."
        )
    return client


def folder_of(node_config: Mapping[str, Any]) -> pathlib.Path:
    """Returns the folder in which a node keeps what is its own. Raises: UserError."""
    folder = node_config.get("folder")
    if not isinstance(folder, str) or not folder:
        raise UserError(
            "the node has no folder for what it keeps; start flower-supernode with --node-config "
            "'client=0 folder=\"nodes/0\"'."
        )
    return pathlib.Path(folder).expanduser()


def with_own(
    config: "ml_collections.ConfigDict", node_config: Mapping[str, Any]
) -> "ml_collections.ConfigDict":
    """Returns the config with the fields that a node sets for itself.

    Raises: UserError for fields that must be the same everywhere.
    """
    from spear_jax.experiment.command_line import apply_overrides

    own = {name: value for name, value in node_config.items() if name not in ("client", "folder")}
    for name in own:
        if name not in OF_NODES and not name.startswith("feedback."):
            raise UserError(
                f"a node cannot set {name!r}; it sets {', '.join(OF_NODES)} and feedback.* for "
                "itself, and all else is the server's."
            )
    config = config.copy_and_resolve_references()
    return apply_overrides(config, [f"--config.{name}={value}" for name, value in own.items()])
