"""The run folder's config: made once, compared on every return."""

import json
import os
import pathlib
from typing import Any

import ml_collections

from spear_jax.algorithms import ALGORITHMS
from spear_jax.core.errors import UserError, unknown
from spear_jax.experiment.config import RENAMED, default_config, flatten


def open_workdir(
    workdir: str, config: ml_collections.ConfigDict, resume: str
) -> tuple[pathlib.Path, bool]:
    """Makes or checks the run folder.

    Args: resume: "auto" goes on where a run of the same config stopped, "never" insists on a new
        folder, "must" on an old.
    Returns: the folder; whether it holds an earlier run of this config.
    Raises: UserError for a folder of another config (naming the keys that differ), or against the
        resume mode.
    """
    if resume not in ("auto", "never", "must"):
        raise unknown("resume mode", resume, ("auto", "never", "must"))
    folder = pathlib.Path(workdir)
    file = folder / "config.json"
    if file.exists():
        if resume == "never":
            raise UserError(
                f"{workdir} holds a run already; give a new --workdir, or --resume=auto to go on."
            )
        old, flat = flatten(read_run_config(folder)), flatten(config)
        others = tuple(f"{name}." for name in ALGORITHMS if name != config.algorithm.name)
        differing = sorted(
            name
            for name in old.keys() | flat.keys()
            if old.get(name) != flat.get(name) and not name.startswith(others)
        )
        if differing:
            changes = ", ".join(
                f"{name} ({old.get(name)} there, {flat.get(name)} now)" for name in differing
            )
            raise UserError(
                f"{workdir} holds a run of another config; differing: {changes}. Give a new "
                f"--workdir."
            )
        return folder, True
    if resume == "must":
        raise UserError(
            f"--resume=must, but {workdir} holds no run; check --workdir, or use --resume=auto."
        )
    folder.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(config.to_dict(), indent=1) + "\n")
    os.replace(temporary, file)
    return folder, False


RETIRED = (
    ("rollout", "segment"),
)  # fields of older versions that changed speed alone; they are dropped


def read_run_config(folder: pathlib.Path) -> ml_collections.ConfigDict:
    """The resolved config of a run folder, fields that are younger than the run at their defaults.

    Raises: UserError where there is none.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(
            f"{folder} is no run folder: it has no config.json. Give the --workdir of a `train` "
            f"command."
        )
    try:
        saved = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file} is not valid JSON ({error}); remove the folder and train again."
        ) from error
    for group, name in RETIRED:
        saved.get(group, {}).pop(name, None)
    for old, new in RENAMED.items():
        _move(saved, old.split("."), new.split("."))
    config = default_config()
    with config.unlocked():  # a field that is no longer there stays to be seen, and differs
        config.update(saved)
    return config


def _move(saved: dict[str, Any], old: list[str], new: list[str]) -> None:
    """Gives a field of a saved config its present name."""
    *groups, name = old
    for group in groups:
        saved = saved.get(group, {})
    if name in saved:
        saved[new[-1]] = saved.pop(name)
