"""A run's metrics in a Weights & Biases project (config.wandb), beside metrics.jsonl and
TensorBoard.
"""

import importlib.util
import netrc
import os
import pathlib
import secrets
import socket
import sys
import urllib.parse
from typing import Any

import ml_collections

from spear_jax.core.errors import UserError
from spear_jax.core.files import write_whole
from spear_jax.core.surroundings import say

ID = "wandb_id"
HOST = "https://api.wandb.ai"


def check_wandb(config: ml_collections.ConfigDict) -> None:
    """Raises UserError where config.wandb names a project and the package is missing."""
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"wandb is {config.wandb!r}, but the package is not installed; `pip install "
            f"spear-jax[wandb]`, or leave "
            "--config.wandb empty (metrics.jsonl and TensorBoard have the same numbers)."
        )


class WandbLogger:
    """One W&B run for one run folder: its id is kept there, so that a run that goes on after a kill
    goes on there too.

    Where WANDB_MODE is not set, the run is online if somebody is logged in and the server answers,
    else offline: its files are then in WORKDIR/wandb, for `wandb sync`.

    Args:
        workdir: the run folder.
        config: the resolved config; `wandb` is the project.
    """

    def __init__(self, workdir: pathlib.Path, config: ml_collections.ConfigDict):
        import wandb  # here, not above: an extra, and it takes a second

        file = workdir / ID
        if not file.exists():
            write_whole(file, secrets.token_hex(4) + "\n")
        mode = os.environ.get("WANDB_MODE") or ("online" if _reachable() else "offline")
        if mode == "offline":
            say(
                f"W&B: offline; `wandb sync {workdir / 'wandb'}/offline-run-*` sends it", sys.stderr
            )
        self.run = wandb.init(
            project=config.wandb,
            id=file.read_text(encoding="utf-8").strip(),
            name="/".join(workdir.resolve().parts[-2:]),
            dir=str(workdir),
            config=config.to_dict(),
            mode=mode,
            resume="allow"
            if mode == "online"
            else None,  # offline runs of one id become one when they are sent
            settings=wandb.Settings(silent=True, console="off"),
        )

    def write(self, line: dict[str, Any]) -> None:
        """A round's metrics, at step `round`."""
        self.run.log(
            {name: value for name, value in line.items() if "/" in name}, step=line["round"]
        )

    def close(self) -> None:
        self.run.finish()


def _reachable() -> bool:
    """Whether somebody is logged in (WANDB_API_KEY or a netrc file), and the server takes a
    connection within three seconds.
    """
    address = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", HOST))
    if not (os.environ.get("WANDB_API_KEY") or _has_password(address.hostname)):
        return False
    try:
        with socket.create_connection((address.hostname, address.port or 443), timeout=3):
            return True
    except OSError:
        return False


def _has_password(host: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
